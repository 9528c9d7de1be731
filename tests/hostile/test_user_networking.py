"""A guest whose QEMU makes its connections: to the agent it comes from 127.0.0.1, as whoever is on the host does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.commands.drill import ask_for_drill
from exporter.prometheus.vm_series import VmLabels
from exporter.web.settings import DRILL_HEADER, DRILL_PATH
from tests.agents import AgentProcess, open_agent
from tests.hostile.networked_guest import send_from_guest
from tests.live import open_guest_process
from tests.waiting import wait_until

pytestmark = [pytest.mark.live, pytest.mark.lab]

NEIGHBOUR, UUID = "customer-7-database", "3d0c44f2-8b9e-4b5e-a2f1-70b3a3c1f7e5"
# What a guest can say to be taken for somebody else.
DISGUISES = {
    "none": (),
    "localhost": ("Host: localhost",),
    "proxied": ("Host: localhost", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1"),
    "browser": ("Host: localhost", "Origin: http://localhost", "Sec-Fetch-Site: same-origin"),
    "user": ("Host: localhost", "Authorization: Basic cm9vdDpyb290"),
    "other-name": ("Host: agent.attacker.example",),
}


def build_request(method: str, target: str, *headers: str) -> bytes:
    host = () if any(header.startswith("Host:") for header in headers) else ("Host: 10.0.2.2",)
    lines = [f"{method} {target} HTTP/1.1", *host, *headers, "Connection: close", "Content-Length: 0"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def knows_details(agent: AgentProcess, name: str) -> bool:
    """Tell whether root at the socket is shown the name, so that there is something to hide."""
    return name in agent.get_text("/-/status?q=customer-7")


@pytest.mark.parametrize("labels", VmLabels)
def test_a_guest_at_10_0_2_2_gets_no_detail_and_no_drill(
    labels: VmLabels, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    requests = {"metrics": build_request("GET", "/metrics")}
    for name, headers in DISGUISES.items():
        requests[f"api.{name}"] = build_request("GET", "/api/v1/vcpus", *headers)
        requests[f"page.{name}"] = build_request("GET", "/-/status?q=customer-7", *headers)
        drill = f"{DRILL_PATH}?vm={NEIGHBOUR}"
        requests[f"drill.{name}"] = build_request("POST", drill, *headers, f"{DRILL_HEADER}: yes")
    with (
        open_agent(f"--web.labels={labels}") as agent,
        open_guest_process(name=NEIGHBOUR, uuid=UUID, stats_fds=True, port_writes=1),
    ):
        wait_until(lambda: knows_details(agent, NEIGHBOUR), "the neighbour is known")
        found = send_from_guest(tmp_path, agent.port, requests)
        drills = agent.samples("kvm_vcpu_drill")
        told = ask_for_drill(agent.socket, NEIGHBOUR)  # the drill that root gets shows that there was one to be had
    assert found["metrics"].status == 200  # it has been there
    assert UUID.encode() in found["metrics"].body
    assert (NEIGHBOUR.encode() in found["metrics"].body) is (labels is VmLabels.FULL)
    for name in DISGUISES:
        api, page, drill_answer = (found[f"{kind}.{name}"] for kind in ("api", "page", "drill"))
        assert (api.status, json.loads(api.body)["details"]) == (200, False), name
        assert page.status == 200
        assert NEIGHBOUR.encode() not in page.body, name
        assert drill_answer.status == 403, name
    assert drills == {}
    assert NEIGHBOUR in told
    size = len(found["metrics"].body)
    tell(f"a guest at 10.0.2.2, {len(DISGUISES)} disguises, --web.labels={labels}: scraped {size} bytes, saw no detail")
