"""The tables that the first screen is for: who is stalled and whose it is, where nobody can tell, which alerts fire."""

from __future__ import annotations

from typing import Final

from exporter.prometheus import metrics as m
from exporter.prometheus.metrics import Metric
from grafana.builder.colors import CANNOT_TELL, SEVERITY, STALLED_FOR
from grafana.builder.layout import Panel, link_to_host, link_to_vm
from grafana.builder.queries import (
    AGENTS,
    ALERT_ACTIVE_SINCE,
    ALERTS,
    HOST_KEYS,
    UP,
    VM_KEYS,
    call_by_name,
    find_stalled,
    lead_to_what_is_known,
    name_stalled,
    select,
    tell_by,
)
from grafana.builder.tables import JOB, Column, count_of, hide, make_table

VCPU_KEYS: Final = f"{VM_KEYS}, vcpu"
ALERT_KEYS: Final = f"{VM_KEYS}, alertname, severity, microcode"
# The alerts about hosts where a stall would go unseen.
DOWN: Final = "KvmNotifyExporterDown"
INCOMPLETE: Final = "KvmNotifyAgentBlind"
LEFT_OUT: Final = "KvmNotifyVmsLeftOut"
# Why VMs are left out that the agent sees.
LEFT_OUT_REASONS: Final = "over_budget|owners_pending"
NO_RIPS: Final = "KvmNotifyStallsNotDetected"
# Of the job and instance that were chosen, and those about a whole fleet, which have neither.
SCOPES: Final = ('job=~"$job", instance=~"$instance"', 'job="", instance=""')


def make_stalled_table(number: int, vm_exit_rate: str, *info: Metric, rows: int, no_value: str) -> Panel:
    """Return the table of stalled vCPUs; ``vm_exit_rate`` is a query by VM, ``info`` has names and owners."""
    start = f"max by ({VCPU_KEYS}) ({select(m.VCPU_STALL_START)})"
    return make_table(
        number,
        "Stalled now",
        "Each vCPU that makes no forward progress, whose VM it is (where kvm_vm_info is kept), since when, and how "
        "many notify exits its VM takes. The RIP is in the agent's log and API.",
        {
            "stalled": name_stalled(*info),
            "since": f"{start} * 1000",
            "lasted": f"time() - {start}",
            "rate": f"0 * ({find_stalled()}) + on ({VM_KEYS}) group_left () sum by ({VM_KEYS}) ({vm_exit_rate})",
        },
        [
            Column(field="who", title="VM", width=220, links=[link_to_vm()]),
            Column(field="owner", title="Owner", width=130),
            Column(field="vcpu", title="vCPU", width=64),
            Column(field="lasted", title="Stalled for", width=120, unit="s", thresholds=STALLED_FOR),
            Column(field="since", title="Since", width=150, unit="dateTimeAsIsoNoDateIfToday"),
            count_of("rate", "Exits/s of VM", 130),
            Column(field="instance", title="Host", width=240, links=[link_to_host()]),
            Column(field="vm", title="VM's id", width=150, grows=True, links=[link_to_vm()]),
            JOB,
        ],
        sort_by=["Stalled for"],
        rows=rows,
        no_value=no_value,
    )


def select_reasons(matcher: str) -> str:
    """Return a selector of the reasons for which VMs are left out on purpose, with ``!~`` of all others."""
    return f'{m.INCOMPLETE_REASON.name}{{{SCOPES[0]}, reason{matcher}"{LEFT_OUT_REASONS}"}}'


def make_blind_table(number: int) -> Panel:
    """Return the table of hosts on which a stall would go unseen, and why; since when, the alerts' series know."""
    down, incomplete = f"{AGENTS} == 0", f"max by ({HOST_KEYS}) ({select(m.COMPLETE)}) == 0"
    left_out, reasons = (
        f"max by ({HOST_KEYS}, reason) ({select_reasons(matcher)}) and on ({HOST_KEYS}) {incomplete}"
        for matcher in ("=~", "!~")
    )
    untold = (
        f"max by ({HOST_KEYS}, lockdown) ({select(m.HOST_INFO)}) unless on ({HOST_KEYS}) {select(m.HOST_NO_PROGRESS)}"
    )
    no_rips = f'label_replace({untold}, "reason", "no RIPs", "instance", ".*")'
    no_rips = f'label_replace({no_rips}, "reason", "no RIPs: kernel lockdown", "lockdown", "confidentiality")'
    known_to_prometheus = select(UP)
    hosts = " or ".join(
        (
            tell_by(f"{down} and on ({HOST_KEYS}) {known_to_prometheus}", DOWN, state="down", reason="does not answer"),
            tell_by(
                f"{down} unless on ({HOST_KEYS}) {known_to_prometheus}", DOWN, state="down", reason="no target now"
            ),
            tell_by(
                f"({reasons} or on ({HOST_KEYS}) ({incomplete} unless on ({HOST_KEYS}) {select_reasons('=~')}))",
                INCOMPLETE,
                state="blind",
            ),
            tell_by(f"({left_out})", LEFT_OUT, state="blind"),
            tell_by(f"max by ({HOST_KEYS}, reason) ({no_rips})", NO_RIPS, state="blind"),
        )
    )
    keys = f"{HOST_KEYS}, alertname"
    names = "|".join((DOWN, INCOMPLETE, LEFT_OUT, NO_RIPS))
    since = f'{ALERT_ACTIVE_SINCE.name}{{alertname=~"{names}", {SCOPES[0]}}}'
    return make_table(
        number,
        "Agents down or blind",
        "Hosts where a stall would go unseen, and why: down, Prometheus cannot scrape the agent; blind, the agent "
        "does not see every VM, or cannot have RIPs. Since when is known where the alerts' rules run.",
        {"hosts": hosts, "since": f"max by ({keys}) ({since}) * 1000 and on ({keys}) ({hosts})"},
        [
            Column(field="state", title="State", width=80, mappings=CANNOT_TELL),
            Column(field="instance", title="Host", width=160, grows=True, links=[link_to_host()]),
            Column(field="reason", title="Reason", width=210),
            Column(field="since", title="Since", width=130, unit="dateTimeFromNow"),
            hide("alertname"),
            JOB,
        ],
        sort_by=["State", "Host"],
        rows=3,
        width=12,
        no_value="no agent is known to be down or blind",
    )


def make_alerts_table(number: int) -> Panel:
    """Return the table of alerts that fire, by host; Prometheus keeps them as series."""
    firing = " or ".join(
        f'{ALERT_ACTIVE_SINCE.name}{{alertname=~"Kvm.*", {scope}}} * 1000 and ignoring (alertstate) '
        f'{ALERTS.name}{{alertname=~"Kvm.*", alertstate="firing", {scope}}}'
        for scope in SCOPES
    )
    to_host = link_to_host(uid="${__data.fields.host_board}")
    to_vm = link_to_vm(uid="${__data.fields.vm_board}")
    return make_table(
        number,
        "Firing alerts",
        "Alerts of these rules that fire now, and since when they have had a reason. The runbook says what to do.",
        {"since": lead_to_what_is_known(call_by_name(firing, ALERT_KEYS))},
        [
            Column(field="severity", title="Severity", width=90, mappings=SEVERITY),
            Column(field="alertname", title="Alert", width=250),
            Column(field="where", title="Host", width=240, links=[to_host]),
            Column(field="who", title="VM", width=160, grows=True, links=[to_vm]),
            Column(field="owner", title="Owner", width=130),
            Column(field="microcode", title="Microcode", width=110),
            Column(field="since", title="Since", width=140, unit="dateTimeFromNow"),
            *(hide(field) for field in ("vm", "instance", "host_board", "vm_board")),
            JOB,
        ],
        sort_by=["Severity", "Host"],
        ascending=True,
        rows=2,
        no_value="no firing alert is known",
    )
