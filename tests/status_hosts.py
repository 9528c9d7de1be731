"""Simulated hosts for the status page: with names of a hostile kind, in any number, and served by a real server."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from exporter.build_info import BuildInfo
from exporter.history.recorder import SnapshotRecorder
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.selection import CollectorSettings
from exporter.stalls.drill import NoDrill
from exporter.stalls.verdicts import MonitorReport, State, VcpuReport
from exporter.web.listeners import TcpAddress
from exporter.web.server import open_server
from exporter.web.settings import ServerSettings
from exporter.web.web_config_file import WebConfigFile
from kvm.model import Owner, Protection, Snapshot, VmReading
from tests.reports import make_report
from tests.snapshots import make_reading, make_snapshot
from tests.users import write_web_config

SCRIPT = "<script>alert(1)</script>"
HOSTILE_NAMES = (
    SCRIPT,
    "'\"><img src=x onerror=alert(1)>",
    "</td></table></title></style><svg onload=alert(1)>",
    "invoice\u202egnp.exe",
    "bell\a\x1b[2Jnull\0tab\tline\nnext\u2028paragraph",
    "undecodable\udcff",
    "w" * 5_000,
    "שרת-בית",
    "z" + "\u0335\u0322\u0327" * 40,
    "&lt;b&gt;&amp;{{7*7}}${7*7}%s%n",
)


def make_vm_reading(name: str, pid: int, notify: tuple[int, ...] = (7, 0), vm_id: str = "") -> VmReading:
    reading = make_reading(name, notify, pid)
    owner = Owner("qemu", name=name, uuid=reading.vm.owner.uuid, project=f"owner-of-{name}", display_name=name[::-1])
    vm = replace(reading.vm, owner=owner, id=vm_id or reading.vm.id)
    return replace(reading, vm=vm, protection=Protection.ARMED)


def make_reports(readings: Sequence[VmReading], *states: State, now: float = 100.0) -> tuple[VcpuReport, ...]:
    """A report of the first vCPU of each VM, in these states, one after the other."""
    return tuple(
        replace(
            make_report(states[number % len(states)], vm=reading.vm, since=now - 5, stuck_since_seconds=now - 6),
            notify_exits=1000 + number,
            moved_seconds=now - 0.5,
        )
        for number, reading in enumerate(readings)
    )


def make_large_host(vms: int, vcpus: int, exits: int) -> Snapshot:
    """A host on which every vCPU has taken notify exits."""
    columns = (tuple(exits * (1 + index) for index in range(vcpus)), 4000)
    return make_snapshot(*(make_vm_reading(f"web-{number}", columns[1] + number, columns[0]) for number in range(vms)))


class FixedHost:
    """A reader of what it is given, at the time it is asked; ``looks`` counts how often that was."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.looks = 0

    def read(self) -> Snapshot:
        self.looks += 1
        return replace(self.snapshot, monotonic_seconds=time.monotonic(), unix_seconds=time.time())

    def close(self) -> None:
        """Nothing to give back."""


class FixedWatcher:
    """A watcher that reports what it is told to."""

    def __init__(self, *vcpus: VcpuReport, problem: str = "", trigger: str = "bpf") -> None:
        self.watch_report = MonitorReport(vcpus=vcpus, problem=problem, trigger=trigger)
        self.asked = 0

    def report(self) -> MonitorReport:
        self.asked += 1
        return self.watch_report

    async def start_drill(self, name: str) -> VcpuReport:
        raise NoDrill(name)


def open_collector(recorder: SnapshotRecorder) -> HostCollector:
    build = BuildInfo("0.1.0", "abc123", "3.11")
    return HostCollector(recorder, CollectorSettings(), build, time.perf_counter)


class ScriptedAgent:
    """A server of the page whose answers to the script are told: status and delay, by the words of the search."""

    def __init__(self, page: str, parts: Callable[[str], str]) -> None:
        self.asked: list[tuple[float, str]] = []
        self.answers: dict[str, tuple[int, float]] = {}
        self.date = "Mon, 20 Nov 2023 01:02:03 GMT"
        self.stop = threading.Event()
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                target = urlsplit(self.path)
                query = parse_qs(target.query).get("q", [""])[0]
                status, text = (200, page) if target.path == "/" else (404, "")
                if target.path == "/-/status":
                    agent.asked.append((time.monotonic(), query))
                    status, delay = agent.answers.get(query, (200, 0.0))
                    agent.stop.wait(delay)
                    text = parts(query)
                self.send_response_only(status)
                for name, value in (("Date", agent.date), ("Content-Type", "text/html; charset=utf-8")):
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(text.encode())

            def log_message(self, *arguments: object) -> None:
                """Be silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    @contextmanager
    def run(self) -> Iterator[None]:
        with self._server:
            thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield
            finally:
                self.stop.set()
                self._server.shutdown()
                thread.join(30)


@contextmanager
def serve_host(
    host: FixedHost, watcher: FixedWatcher | None = None, port: int = 0, host_name: str = "hv-17.example"
) -> Iterator[int]:
    """Serve a host from a thread to the user of tests, who sees names; gives the port."""
    with tempfile.TemporaryDirectory() as directory:
        web_config = WebConfigFile(write_web_config(directory))
    listening, ports = threading.Event(), list[int]()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        recorder = SnapshotRecorder(host)
        settings = ServerSettings(addresses=(TcpAddress("127.0.0.1", port),), host_name=host_name)
        collector = open_collector(recorder)
        async with open_server(collector, recorder, settings, watcher=watcher, web_config=web_config) as (address,):
            assert isinstance(address, TcpAddress)
            ports.append(address.port)
            listening.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert listening.wait(30)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
