"""/api/v1/vcpus and /-/drill over HTTP: what they say, and to whom."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from exporter.history.recorder import SnapshotRecorder
from exporter.stalls import drill
from exporter.stalls.verdicts import Evidence, MonitorReport, State, VcpuReport
from exporter.web import vcpus_json
from exporter.web.access import PRIVATE_HEADERS
from exporter.web.listeners import Address, TcpAddress, UnixAddress
from exporter.web.server import open_server
from exporter.web.settings import DRILL_HEADER, DRILL_PATH, VCPUS_PATH, ServerSettings
from kvm.model import BlindSpot, Snapshot
from kvm.simulated.host import SimulatedHost
from tests.exporter.web.test_server import Client, open_collector
from tests.reports import make_report, make_vm
from tests.snapshots import make_reading, make_snapshot
from tests.waiting import PATIENCE_SECONDS

Scenario = Callable[[Address], Awaitable[None]]
DETAILS = {"rip", "instruction", "name", "display_name", "project", "namespace", "vmm", "pid", "tid"}
MARKED = f"{DRILL_HEADER}: yes"


class FakeWatcher:
    def __init__(self, *vcpus: VcpuReport) -> None:
        self.vcpus = vcpus
        self.drills: list[str] = []
        self.reports = 0

    def report(self) -> MonitorReport:
        self.reports += 1
        return MonitorReport(
            vcpus=self.vcpus, trigger="poll", trigger_problem="no libbpf.so.1", poll_period_seconds=1.0
        )

    async def start_drill(self, name: str) -> VcpuReport:
        if not name:
            raise drill.NoDrill("no VM is called ''")
        self.drills.append(name)
        return make_report(drill=True)


def serve(scenario: Scenario, watcher: FakeWatcher | None, *addresses: Address, max_requests: int = 40) -> None:
    async def main() -> None:
        settings = ServerSettings(addresses=addresses, max_requests=max_requests)
        recorder = SnapshotRecorder(SimulatedHost())
        async with open_server(open_collector(recorder), recorder, settings, watcher=watcher) as (address, *_):
            await asyncio.wait_for(scenario(address), PATIENCE_SECONDS)

    with tempfile.TemporaryDirectory() as directory:
        # The test is the agent's own user, so that the agent knows it there.
        addresses = addresses or (UnixAddress(f"{directory}/agent.sock"),)
        asyncio.run(main())


async def ask(address: Address, path: str, *headers: str, method: str = "GET") -> tuple[int, str]:
    host = "localhost" if isinstance(address, UnixAddress) else str(address)
    lines = [f"{method} {path} HTTP/1.1"]
    if not any(header.lower().startswith("host:") for header in headers):
        lines.append(f"Host: {host}")
    client = await Client.open(address)
    try:
        await client.send("\r\n".join([*lines, *headers, "", ""]).encode())
        answer = await client.read_answer()
    finally:
        await client.close()
    return answer.status, answer.body.decode()


async def ask_vcpus(address: Address, *headers: str) -> dict[str, Any]:
    status, body = await ask(address, VCPUS_PATH, *headers)
    assert status == 200
    found: dict[str, Any] = json.loads(body)
    return found


def test_what_is_known_of_each_vcpu() -> None:
    now = time.monotonic()
    report = make_report(idt_vectoring=0x80000B11, stuck_since_seconds=now - 10, context_invalid=True)
    quiet = replace(make_report(State.QUIET, vcpu=1), deferred_reason="others have their turn")
    watcher = FakeWatcher(quiet, replace(report, moved_seconds=now - 1))

    async def scenario(address: Address) -> None:
        document = await ask_vcpus(address)
        assert (document["trigger"], document["problem"], document["details"]) == ("poll", None, True)
        assert document["trigger_problem"] == "no libbpf.so.1"
        stalled, quiet = document["vcpus"]
        assert (quiet["state"], quiet["vcpu"], quiet["deferred_reason"]) == ("quiet", 1, "others have their turn")
        assert stalled["stuck_since_unix_seconds"] == pytest.approx(time.time() - 10, abs=1)
        assert stalled["last_notify_exit_unix_seconds"] == pytest.approx(time.time() - 1, abs=1)
        expected = {
            "vm": "uuid-4242",
            "vcpu": 0,
            "state": "stalled",
            "deferred_reason": None,
            "evidence": "trace",
            "streak": 64,
            "exits_at_rip": 40,
            "notify_window_exits": 1234,
            "traced_exits": 64,
            "same_rip_exits": 63,
            "registers_alike": True,
            "nested": False,
            "context_invalid": True,
            "delivering": "vector 17 (#AC)",
            "drill": False,
            "rip": "0xffffffff81012345",
            "name": "web",
            "project": "shop",
            "pid": 4242,
            "tid": 5000,
        }
        assert {key: stalled[key] for key in expected} == expected

    serve(scenario, watcher)


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: evil.example"],
        ["X-Forwarded-For: 10.0.0.1"],
        ["Forwarded: for=10.0.0.1"],
        ["Via: 1.1 proxy"],
        ["Host: 10.0.0.1:9750"],
        ["Host: [::1]evil"],
        ["X-Request-Id: 1"],
        ["CF-Connecting-IP: 10.0.0.1"],
        ["X-Forwarded-Proto: https"],
        ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"],
        ["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors"],
    ],
)
def test_rips_and_owners_are_not_for_strangers(headers: list[str]) -> None:
    async def scenario(address: Address) -> None:
        document = await ask_vcpus(address, *headers)
        assert document["details"] is False
        assert not DETAILS & set(document["vcpus"][0])
        assert "0xffffffff81012345" not in json.dumps(document)

    serve(scenario, FakeWatcher(make_report()))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]:9750", "10.0.2.2"])
def test_loopback_is_no_identity(host: str) -> None:
    """A guest with user networking comes from there, and so does every local user."""
    watcher = FakeWatcher(make_report())

    async def scenario(address: Address) -> None:
        document = await ask_vcpus(address, f"Host: {host}")
        assert document["details"] is False
        assert not DETAILS & set(document["vcpus"][0])
        assert (await ask(address, f"{DRILL_PATH}?vm=web", f"Host: {host}", MARKED, method="POST"))[0] == 403

    serve(scenario, watcher, TcpAddress("127.0.0.1", 0))
    assert watcher.drills == []


def test_the_answer_is_not_for_other_sites_nor_to_be_kept() -> None:
    assert PRIVATE_HEADERS["Cache-Control"] == "no-store"
    assert PRIVATE_HEADERS["Cross-Origin-Resource-Policy"] == "same-origin"


def test_an_agent_that_does_not_watch_says_so() -> None:
    async def scenario(address: Address) -> None:
        document = await ask_vcpus(address)
        assert (document["problem"], document["vcpus"]) == ("not watched", [])
        assert (await ask(address, f"{DRILL_PATH}?vm=web", MARKED, method="POST"))[0] == 409

    serve(scenario, None)


def test_a_drill_is_asked_for_by_post_with_its_header_by_whom_the_agent_knows() -> None:
    watcher = FakeWatcher()
    path = f"{DRILL_PATH}?vm=web%201"

    async def scenario(address: Address) -> None:
        assert (await ask(address, path, MARKED))[0] == 405
        assert (await ask(address, path, method="POST"))[0] == 403
        assert (await ask(address, path, MARKED, "Origin: http://localhost", method="POST"))[0] == 403
        assert (await ask(address, path, MARKED, "X-Forwarded-For: 1.2.3.4", method="POST"))[0] == 403
        assert (await ask(address, path, MARKED, "Host: rebound.example", method="POST"))[0] == 403
        assert watcher.drills == []
        status, body = await ask(address, path, MARKED, method="POST")
        assert (status, watcher.drills) == (200, ["web 1"])
        assert "is stalled for 60 s" in json.loads(body)["message"]
        status, body = await ask(address, path, MARKED, method="POST")
        assert (status, watcher.drills) == (429, ["web 1"])
        assert "may begin in 300 s" in body

    serve(scenario, watcher)


def test_a_drill_that_was_not_had_costs_no_pause() -> None:
    watcher = FakeWatcher()

    async def scenario(address: Address) -> None:
        assert (await ask(address, DRILL_PATH, MARKED, method="POST"))[0] == 409
        assert (await ask(address, f"{DRILL_PATH}?vm=web", MARKED, method="POST"))[0] == 200

    serve(scenario, watcher)


@pytest.mark.parametrize("path", [VCPUS_PATH, DRILL_PATH])
def test_the_metrics_cannot_take_these_paths(path: str) -> None:
    with pytest.raises(ValueError, match="taken"):
        ServerSettings(telemetry_path=path)


def test_an_empty_list_is_no_all_clear_where_vms_are_not_seen() -> None:
    def ask(snapshot: Snapshot | None) -> tuple[object, object, object]:
        document = vcpus_json.build_document(MonitorReport(), snapshot, 0.0, 0.0, with_details=True)
        return document["complete"], document["incomplete_reasons"], document["unread_vms"]

    snapshot = make_snapshot(make_reading(), replace(make_reading("b", pid=101), source=""))
    assert ask(None) == (None, [], None)
    assert ask(snapshot) == (True, [], 1)
    assert ask(replace(snapshot, blind_spots=(BlindSpot("no_source", "none works"),))) == (False, ["no_source"], 1)


@pytest.mark.parametrize(
    ("problem", "expected"), [("", "kernel"), ("exits cannot be traced: lockdown forbids it", None)]
)
def test_what_tells_rips_is_said_once_for_the_host(problem: str, expected: str | None) -> None:
    report = MonitorReport(evidence=Evidence.KERNEL, problem=problem)
    document = vcpus_json.build_document(report, None, 1.0, 2.0, with_details=True)
    assert document["evidence"] == expected


def test_what_matters_comes_first() -> None:
    states = [State.QUIET, State.RECOVERED, State.STALLED, State.UNKNOWN, State.SUSPECT, State.PROGRESSING]
    reports = tuple(make_report(state, vm=make_vm(pid=number)) for number, state in enumerate(states))
    document = vcpus_json.build_document(MonitorReport(vcpus=reports), None, 0.0, 0.0, with_details=True)
    vcpus = document["vcpus"]
    assert isinstance(vcpus, list)
    assert [found["state"] for found in vcpus] == [
        "stalled",
        "suspect",
        "unknown",
        "recovered",
        "quiet",
        "progressing",
    ]


def test_many_who_ask_at_once_get_a_few_renderings() -> None:
    watcher = FakeWatcher(make_report())

    async def scenario(address: Address) -> None:
        await asyncio.gather(*(ask_vcpus(address) for _ in range(100)))

    serve(scenario, watcher)
    assert watcher.reports < 50


def test_slow_readers_hold_as_many_documents_as_there_may_be() -> None:
    # Some megabytes, of which the small buffer of a Unix socket takes next to nothing.
    watcher = FakeWatcher(*(make_report(vcpu=number) for number in range(2000)))

    async def scenario(address: Address) -> None:
        assert len((await ask(address, VCPUS_PATH))[1]) > 1_000_000
        slow = [await Client.open(address) for _ in range(2)]
        for client in slow:
            await client.send(f"GET {VCPUS_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (await client.reader.readline()).startswith(b"HTTP/1.1 200 ")
        assert (await ask(address, VCPUS_PATH))[0] == 503
        assert (await ask(address, "/metrics"))[0] == 503
        for client in slow:
            await client.close()
        while (await ask(address, VCPUS_PATH))[0] == 503:
            await asyncio.sleep(0.01)

    serve(scenario, watcher, max_requests=2)
