"""``once --from-agent``: what the running agent knows of the vCPUs that take notify exits.

One snapshot cannot tell whether a vCPU is stuck, and a second agent would trace what the first one traces already. So
the one that runs is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from exporter.commands.agent_socket import AgentUnreachable, ask_agent
from exporter.commands.columns import render_columns
from exporter.top.cells import UNKNOWN
from exporter.web.listeners import Address
from exporter.web.settings import VCPUS_PATH

_HEADER: Final = (
    *("VM", "NAME", "OWNER", "VMM", "PID", "VCPU", "STATE", "STUCK SINCE", "RIP", "NOTIFY EXITS", "REASON"),
)
_RIGHT: Final = {"PID", "VCPU", "NOTIFY EXITS"}

Document = Mapping[str, Any]
"""What ``/api/v1/vcpus`` answers (``exporter/web/vcpus_json.py``)."""


def read_agent_report(address: Address) -> Document:
    """Ask the agent at a Unix socket; raises AgentUnreachable, and ValueError for another kind of address."""
    answer = ask_agent(address, "GET", VCPUS_PATH)
    if answer.status != 200:
        raise AgentUnreachable(f"the agent at {address} does not tell ({answer.status}): {answer.text}")
    try:
        return parse_report(answer.text)
    except ValueError as err:
        raise AgentUnreachable(f"what answers at {address} is no agent of this version: {err}") from err


def parse_report(text: str) -> Document:
    """Understand what an agent has answered; raises ValueError where it is none's of this version."""
    try:
        document = json.loads(text)
        render_report(document)
        return dict(document)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ValueError(repr(err)) from err


def is_all_known(document: Document) -> bool:
    """Tell whether the agent sees every VM, could read each and watches for stalls."""
    return document["complete"] is True and document["unread_vms"] == 0 and document["problem"] is None


def render_report(document: Document) -> str:
    """Render a table with a row a vCPU, worst first as the agent has sorted them; then what the agent cannot tell."""
    vcpus = document["vcpus"]
    table = (
        render_columns(_HEADER, map(_build_row, vcpus), _RIGHT) if vcpus else "no vCPU is known to take notify exits\n"
    )
    return table + "".join(f"{line}\n" for line in _tell_gaps(document))


def _tell_gaps(document: Document) -> Sequence[str]:
    gaps = []
    if document["complete"] is None:
        gaps.append("the agent has not read the host yet")
    elif not document["complete"]:
        gaps.append(f"VMs may be missing: {', '.join(map(str, document['incomplete_reasons']))}")
    if document["unread_vms"]:
        gaps.append(f"VMs that could not be read: {document['unread_vms']}")
    if document["problem"] is not None:
        gaps.append(f"stalls are not found: {document['problem']}")
    if not document["details"]:
        gaps.append("names, owners and RIPs are for root and for members of the agent's --web.details-group")
    return gaps


def _build_row(vcpu: Document) -> Sequence[object]:
    def show(name: str) -> object:
        value = vcpu.get(name)
        return UNKNOWN if value in (None, "") else value

    owner = vcpu.get("project") or vcpu.get("namespace") or UNKNOWN
    name = vcpu.get("display_name") or show("name")
    state = f"{vcpu['state']} (drill)" if vcpu["drill"] else vcpu["state"]
    since = vcpu["stuck_since_unix_seconds"]
    stuck = UNKNOWN if since is None else datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    who = (vcpu["vm"], name, owner, show("vmm"), show("pid"), vcpu["vcpu"])
    return (*who, state, stuck, show("rip"), show("notify_window_exits"), show("reason"))
