"""The server as clients meet it: real HTTP over sockets, well-behaved and hostile."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter.build_info import BuildInfo
from exporter.history.recorder import SnapshotRecorder
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import Family
from exporter.prometheus.selection import CollectorSettings
from exporter.web.connection_guard import ConnectionGuard
from exporter.web.listeners import Address, TcpAddress, UnixAddress
from exporter.web.server import open_server, serve
from exporter.web.settings import ServerSettings
from kvm.model import Snapshot, SnapshotReader, VmCounters
from kvm.simulated.host import SimulatedHost
from tests.waiting import PATIENCE_SECONDS

LOOPBACK = TcpAddress("127.0.0.1", 0)

Scenario = Callable[[Address], Awaitable[None]]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class GatedHost:
    """A simulated host whose snapshots can be held: each says that it has begun, then waits for the gate."""

    def __init__(self) -> None:
        self._host = SimulatedHost()
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def read(self) -> Snapshot:
        self.begun.release()
        if not self.gate.wait(PATIENCE_SECONDS):
            raise TimeoutError("the test has forgotten to open the gate")
        return self._host.read()

    def close(self) -> None:
        self._host.close()

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_SECONDS)

    async def pass_first_snapshot(self, address: Address) -> None:
        """Let the first snapshot through, and hold the next one."""
        self.gate.set()
        await self.wait_begun()
        await wait_ready(address)
        self.gate.clear()


class BrokenHost:
    def read(self) -> Snapshot:
        raise OSError("no such host")

    def close(self) -> None:
        """Nothing to give back."""


def open_collector(reader: SnapshotReader, settings: CollectorSettings | None = None) -> HostCollector:
    return HostCollector(
        reader, settings or CollectorSettings(), BuildInfo("0.1.0", "abc123", "3.11"), time.perf_counter
    )


def run(
    scenario: Scenario,
    reader: SnapshotReader | None = None,
    *,
    settings: ServerSettings | None = None,
    guard: ConnectionGuard | None = None,
    collector: HostCollector | None = None,
) -> None:
    """Run a scenario against a server of its own; it gets the first address."""

    async def main() -> None:
        chosen, recorder = (
            settings or ServerSettings(addresses=(LOOPBACK,)),
            SnapshotRecorder(reader or SimulatedHost()),
        )
        async with open_server(collector or open_collector(recorder), recorder, chosen, guard) as (address, *_):
            await asyncio.wait_for(scenario(address), PATIENCE_SECONDS)

    asyncio.run(main())


class Client:
    """A raw HTTP client: what it is told to send, it sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: Address) -> Client:
        if isinstance(address, UnixAddress):
            return cls(*await asyncio.open_unix_connection(address.path))
        return cls(*await asyncio.open_connection(address.host or "127.0.0.1", address.port))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_answer(self, method: str = "GET") -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        length = 0 if method == "HEAD" else int(headers["Content-Length"])
        return Answer(int(head[0].split()[1]), headers, await self.reader.readexactly(length))

    async def read_rest(self) -> bytes:
        """Read until the server closes, in whichever way it does."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while block := await self.reader.read(65536):
                data += block
        return data

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def ask(address: Address, target: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
    """One request on a connection of its own; an underscore in a header's name stands for a hyphen."""
    client = await Client.open(address)
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    await client.send(f"{method} {target} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{lines}\r\n".encode())
    answer = await client.read_answer(method)
    assert await client.read_rest() == b""
    await client.close()
    return answer


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = count_fds()
    yield
    for thread in find_workers():
        thread.join(PATIENCE_SECONDS)
    assert not find_workers()
    assert count_fds() == before


def find_workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("scrape", "status", "vcpus"))]


def test_metrics_in_the_text_format() -> None:
    async def scenario(address: Address) -> None:
        answer = await ask(address)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        families = {family.name: family for family in parse_text(answer.body.decode())}
        assert len(families["kvm_vcpu_notify_window_exits"].samples) == 11
        assert families["kvm_exporter_build_info"].samples[0].labels["revision"] == "abc123"
        assert "process_resident_memory_bytes" in families

    run(scenario)


def test_metrics_in_openmetrics_and_gzip() -> None:
    async def scenario(address: Address) -> None:
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
        answer = await ask(address, Accept=accept, Accept_Encoding="gzip")
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
        assert answer.headers["Content-Encoding"] == "gzip"
        text = gzip.decompress(answer.body).decode()
        families = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
        assert families[0].name == "kvm_vcpu_notify_window_exits"
        assert text.count("# EOF") == 1

    run(scenario)


def test_exporter_metrics_can_be_left_out() -> None:
    async def scenario(address: Address) -> None:
        for accept in ("text/plain", "application/openmetrics-text"):
            body = (await ask(address, Accept=accept)).body
            assert b"kvm_vm_info" in body
            assert b"\npython_" not in body
            assert b"\nprocess_" not in body

    run(scenario, settings=ServerSettings(addresses=(LOOPBACK,), exporter_metrics=False))


def test_collectors_can_be_chosen() -> None:
    async def scenario(address: Address) -> None:
        only = (await ask(address, "/metrics?collect[]=host&collect%5B%5D=vm")).body
        assert b"kvm_host_info" in only
        assert b"kvm_vm_info" in only
        assert b"kvm_vcpu_" not in only
        without = (await ask(address, "/metrics?exclude[]=vcpu")).body
        assert b"kvm_exporter_source_up" in without
        assert b"kvm_vcpu_" not in without

    run(scenario)


@pytest.mark.parametrize(
    "query",
    ["collect[]=disk", "exclude[]=disk", "collect[]=vm&exclude[]=host", "collect[]=exporter", "collect[]=%3Cb%3E%00"],
)
def test_bad_choices_are_refused(query: str) -> None:
    async def scenario(address: Address) -> None:
        answer = await ask(address, f"/metrics?{query}")
        assert answer.status == 400
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert b"\0" not in answer.body

    settings = CollectorSettings(enabled=frozenset({"host", "vm", "vcpu"}))
    run(scenario, collector=open_collector(SimulatedHost(), settings))


def test_status_page() -> None:
    async def scenario(address: Address) -> None:
        await wait_ready(address)
        answer = await ask(address, "/")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert b'href="/numbers"' in answer.body
        assert b"simulated" in answer.body
        assert b"Version 0.1.0, revision abc123" in answer.body
        assert (await ask(address, "/numbers")).status == 200
        assert (await ask(address, "/metrics")).status == 404
        parts = await ask(address, "/-/status")
        assert parts.body.startswith(b'<div id="head"')

    run(scenario, settings=ServerSettings(addresses=(LOOPBACK,), telemetry_path="/numbers"))


async def wait_ready(address: Address) -> None:
    while (await ask(address, "/-/ready")).status != 200:
        await asyncio.sleep(0)


def test_metrics_may_stand_at_the_root() -> None:
    async def scenario(address: Address) -> None:
        assert b"kvm_vm_info" in (await ask(address, "/")).body
        assert (await ask(address, "/-/status")).status == 404

    run(scenario, settings=ServerSettings(addresses=(LOOPBACK,), telemetry_path="/"))


@pytest.mark.parametrize(
    "path", ["", "metrics", "/{name}", "/a b", "/-/healthy", "/-/ready", "/-/status", "/a?b", "/a#b", "/a\n", "/%2e"]
)
def test_bad_telemetry_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="telemetry path"):
        ServerSettings(telemetry_path=path)


def test_ready_after_the_first_snapshot() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.wait_begun()
        assert (await ask(address, "/-/healthy")).status == 200
        assert (await ask(address, "/-/ready")).status == 503
        assert b"not been read yet" in (await ask(address, "/")).body
        host.gate.set()
        await wait_ready(address)

    run(scenario, host)


class UnreadHost(SimulatedHost):
    """A host of which every VM is seen and none is read."""

    def read(self) -> Snapshot:
        snapshot = super().read()
        unread = VmCounters(problem="its VMM holds no stats fds")
        readings = (replace(reading, source="", counters=unread) for reading in snapshot.readings)
        return replace(snapshot, readings=tuple(readings))


def test_not_ready_where_no_vm_can_be_read() -> None:
    async def scenario(address: Address) -> None:
        assert (await ask(address)).status == 200
        answer = await ask(address, "/-/ready")
        assert answer.status == 503
        assert b"nothing of this host can be seen: 6 of 6 VMs cannot be read: its VMM holds no" in answer.body

    run(scenario, UnreadHost())


def test_a_first_snapshot_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class FaultyCollector(HostCollector):
        def collect(self, selected: object = None) -> list[Family]:
            raise RuntimeError("a fault of ours")

    async def scenario(address: Address) -> None:
        assert (await ask(address, "/-/healthy")).status == 200
        assert (await ask(address, "/-/ready")).status == 503

    run(scenario, collector=FaultyCollector(SimulatedHost(), CollectorSettings(), BuildInfo("", "", ""), lambda: 0.0))
    assert [(record.levelname, record.message) for record in caplog.records] == [("ERROR", "a snapshot failed")]


def test_failing_reader_is_no_failing_scrape() -> None:
    async def scenario(address: Address) -> None:
        answer = await ask(address)
        assert answer.status == 200
        assert b'kvm_exporter_scrape_collector_success{collector="snapshot"} 0\n' in answer.body
        assert (await ask(address, "/-/ready")).status == 503
        assert (await ask(address, "/-/healthy")).status == 200

    run(scenario, BrokenHost())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_wrong_method(method: str) -> None:
    async def scenario(address: Address) -> None:
        for target in ("/metrics", "/", "/-/status", "/-/healthy"):
            answer = await ask(address, target, method)
            assert answer.status == 405
            assert answer.headers["Allow"] == "GET,HEAD"

    run(scenario)


@pytest.mark.parametrize("target", ["/nothing", "/metrics/", "//", "/../etc/passwd", "/-/", "/favicon.ico", "/%00"])
def test_elsewhere_is_nothing(target: str) -> None:
    async def scenario(address: Address) -> None:
        answer = await ask(address, target)
        assert answer.status == 404
        assert answer.body == b"not found\n"

    run(scenario)


@pytest.mark.parametrize("target", ["/metrics", "/", "/-/status", "/-/healthy", "/nothing"])
def test_head_is_get_without_the_body(target: str) -> None:
    async def scenario(address: Address) -> None:
        full, head = await ask(address, target), await ask(address, target, "HEAD")
        assert head.status == full.status
        assert head.headers["Content-Type"] == full.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0

    run(scenario)


def test_fault_of_ours_is_a_short_500(caplog: pytest.LogCaptureFixture) -> None:
    class FaultyCollector(HostCollector):
        def collect(self, selected: object = None) -> list[Family]:
            if selected is None:
                return []
            raise RuntimeError("secret detail")

    async def scenario(address: Address) -> None:
        answer = await ask(address)
        assert answer.status == 500
        assert b"secret" not in answer.body

    faulty = FaultyCollector(SimulatedHost(), CollectorSettings(), BuildInfo("", "", ""), time.perf_counter)
    run(scenario, collector=faulty)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


# Refused for what it asks, so that it needs no snapshot; turned away before that where there is no place.
ASK_FOR_A_PLACE = "/metrics?collect[]=disk"


def test_too_many_scrapes_are_turned_away() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        scrape = asyncio.create_task(ask(address))
        await host.wait_begun()
        answer = await ask(address)
        assert answer.status == 503
        assert b"limit of concurrent requests reached (1)" in answer.body
        assert (await ask(address, "/-/healthy")).status == 200
        host.gate.set()
        assert (await scrape).status == 200
        assert (await ask(address)).status == 200

    run(scenario, host, settings=ServerSettings(addresses=(LOOPBACK,), max_requests=1))


def test_no_limit_of_scrapes() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        waiting = [asyncio.create_task(ask(address)) for _ in range(50)]
        await host.wait_begun()
        host.gate.set()
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}

    run(scenario, host, settings=ServerSettings(addresses=(LOOPBACK,), max_requests=0))


def test_client_that_leaves_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        client = await Client.open(address)
        await client.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        await host.wait_begun()
        assert (await ask(address, ASK_FOR_A_PLACE)).status == 503
        await client.close()
        while (answer := await ask(address, ASK_FOR_A_PLACE)).status == 503:
            await asyncio.sleep(0)
        assert answer.status == 400
        host.gate.set()
        assert (await ask(address)).status == 200

    settings, guard = ServerSettings(addresses=(LOOPBACK,), max_requests=1), ConnectionGuard(half_closed_seconds=0.05)
    run(scenario, host, settings=settings, guard=guard)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("start", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: test\r\nX: "])
def test_connection_without_a_request_is_cut(start: bytes) -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        await client.send(start)
        assert await client.read_rest() == b""
        await client.close()
        assert (await ask(address)).status == 200

    run(scenario, guard=ConnectionGuard(first_request_seconds=0.05))


def test_drip_of_header_bytes_does_not_keep_a_connection() -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        rest = asyncio.create_task(client.read_rest())
        await client.send(b"GET /metrics HTTP/1.1\r\n")
        while not rest.done():
            try:
                await client.send(b"X: y\r\n")
            except ConnectionError:
                break
            await asyncio.wait({rest}, timeout=0.01)
        assert await rest == b""
        await client.close()

    run(scenario, guard=ConnectionGuard(first_request_seconds=0.1))


def test_kept_connection_serves_again_and_is_cut_when_idle() -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        for target in (b"/metrics", b"/nothing", b"/-/healthy"):
            await client.send(b"GET " + target + b" HTTP/1.1\r\nHost: test\r\n\r\n")
            await client.read_answer()
        assert await client.read_rest() == b""
        await client.close()

    run(scenario, guard=ConnectionGuard(next_request_seconds=0.2))


def test_too_many_connections_cost_the_longest_idle_one() -> None:
    async def scenario(address: Address) -> None:
        clients = [await Client.open(address) for _ in range(5)]
        for client in clients[:2]:
            assert await client.read_rest() == b""
        for client in clients[2:]:
            await client.send(b"GET /-/healthy HTTP/1.1\r\nHost: test\r\n\r\n")
            assert (await client.read_answer()).status == 200
        for client in clients:
            await client.close()

    run(scenario, guard=ConnectionGuard(max_connections=3))


def test_connections_that_are_all_busy_are_kept() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        scrape = asyncio.create_task(ask(address))
        await host.wait_begun()
        late = await Client.open(address)
        assert await late.read_rest() == b""
        await late.close()
        host.gate.set()
        assert (await scrape).status == 200

    run(scenario, host, guard=ConnectionGuard(max_connections=1))


@pytest.mark.parametrize("write_seconds", [0.3, 30.0], ids=["in time", "when its place is needed"])
def test_slow_reader_is_cut_and_holds_nobody_up(
    write_seconds: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A Unix socket has a small buffer of fixed size; TCP's may grow to hold the whole answer.
    address = UnixAddress(str(tmp_path / "agent.sock"))

    async def scenario(address: Address) -> None:
        assert isinstance(address, UnixAddress)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as slow:
            slow.setblocking(False)
            await loop.sock_connect(slow, address.path)
            await loop.sock_sendall(slow, b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
            head = await loop.sock_recv(slow, 100)
            assert head.startswith(b"HTTP/1.1 200")
            answer = await ask(address)
            assert (answer.status, len(answer.body) > 1_000_000) == (503, False)
            while (answer := await ask(address)).status == 503:
                await asyncio.sleep(0.01)
            assert len(answer.body) > 1_000_000
            received = len(head)
            while block := await loop.sock_recv(slow, 1_000_000):
                received += len(block)
            assert received < 1_000_000

    run(
        scenario,
        SimulatedHost(vm_count=625, vcpus_per_vm=16),
        settings=ServerSettings(addresses=(address,), max_requests=1, write_seconds=write_seconds),
    )
    assert [record.message for record in caplog.records] == ["client reads too slowly and is cut off"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /metrics HTTP/1.1\r\nHost: test\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"BREW /metrics HTTP/1.1\r\nHost: test\r\n\r\n",
        b"\r\n\r\nGARBAGE\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: a\r\n\r\n",
    ],
    ids=["header", "target", "tls", "short", "method", "garbage", "length"],
)
def test_nonsense_is_refused(request_bytes: bytes) -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        with contextlib.suppress(ConnectionError):
            await client.send(request_bytes)
        answer = await client.read_rest()
        assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
        assert b"Traceback" not in answer
        assert b"\r\nServer: kvm-notify-exporter\r\n" in answer
        assert not re.search(rb"(?i)python|aiohttp", answer)
        await client.close()
        assert (await ask(address)).status == 200

    run(scenario)


def test_odd_headers_are_answered() -> None:
    async def scenario(address: Address) -> None:
        for accept in ("text/plain;version=a", "application/openmetrics-text;version=1.0.0;q=x", "\xff\xfe", ";q"):
            answer = await ask(address, Accept=accept, Accept_Encoding=";;;q=1,,gzip;q=0")
            assert answer.status == 200
            assert "Content-Encoding" not in answer.headers

    run(scenario)


def test_body_that_never_comes_holds_nobody_up() -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        await client.send(b"GET /-/healthy HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000\r\n\r\nabc")
        assert (await client.read_answer()).status == 200
        assert (await ask(address)).status == 200
        assert await client.read_rest() == b""
        await client.close()

    run(scenario)


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET /-/healthy HTTP/1.1\r\nHost: test\r\n\r"])
def test_half_closed_connection_without_a_request_is_closed(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        await client.send(sent)
        client.writer.write_eof()
        assert await client.read_rest() == b""
        await client.close()
        assert (await ask(address)).status == 200

    run(scenario)
    assert not caplog.records


@pytest.mark.parametrize("target", ["/metrics", "/-/healthy", "/"])
@pytest.mark.parametrize("end", ["", "Connection: close\r\n"])
def test_half_closed_client_gets_its_answers(target: str, end: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        first = f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n"
        await client.send(f"{first}GET {target} HTTP/1.1\r\nHost: test\r\n{end}\r\n".encode())
        client.writer.write_eof()
        answers = [await client.read_answer() for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert await client.read_rest() == b""
        await client.close()

    run(scenario)
    assert not caplog.records


def test_half_closed_client_waits_for_a_limited_time() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        client = await Client.open(address)
        await client.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        await host.wait_begun()
        client.writer.write_eof()
        assert await client.read_rest() == b""
        await client.close()
        host.gate.set()
        assert (await ask(address)).status == 200

    run(scenario, host, guard=ConnectionGuard(half_closed_seconds=0.05))


def test_many_clients_that_hang_up_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    request = b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n"

    async def hang_up(address: Address, sent: int) -> None:
        client = await Client.open(address)
        await client.send((request * 2)[:sent])
        if sent > len(request):
            await client.reader.read(10)
        client.writer.transport.abort()
        await client.close()

    async def scenario(address: Address) -> None:
        await asyncio.gather(*(hang_up(address, sent) for sent in range(0, 2 * len(request), 2)))
        assert (await ask(address)).status == 200

    run(scenario)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_several_addresses(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    settings = ServerSettings(addresses=(LOOPBACK, UnixAddress(str(path)), TcpAddress("127.0.0.1", 0)))

    async def main() -> None:
        recorder = SnapshotRecorder(SimulatedHost())
        async with open_server(open_collector(recorder), recorder, settings) as addresses:
            assert len(addresses) == 3
            for address in addresses:
                assert (await ask(address)).status == 200

    asyncio.run(main())
    assert not path.exists()


def test_stop_finishes_what_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    host = GatedHost()

    async def main() -> None:
        stop = asyncio.Event()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = TcpAddress("127.0.0.1", probe.getsockname()[1])
        recorder, settings = SnapshotRecorder(host), ServerSettings(addresses=(address,))
        server = asyncio.create_task(serve(open_collector(recorder), recorder, settings, stop))
        await host.wait_begun()
        idle, busy = await Client.open(address), await Client.open(address)
        await busy.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (await ask(address, "/-/healthy")).status == 200
        stop.set()
        assert await idle.read_rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await Client.open(address)
        host.gate.set()
        assert b"kvm_vm_info" in (await busy.read_answer()).body
        await server
        for client in (idle, busy):
            await client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    assert [record.message for record in caplog.records] == ["listening", "stopping"]


def test_stop_does_not_wait_for_a_client_that_keeps_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """A browser, or Prometheus between two scrapes; the time to drain is for requests that are under way."""
    caplog.set_level(logging.INFO)
    host = GatedHost()
    host.gate.set()

    async def main() -> None:
        settings = ServerSettings(addresses=(LOOPBACK,), drain_seconds=PATIENCE_SECONDS)
        recorder = SnapshotRecorder(host)
        async with open_server(open_collector(recorder), recorder, settings) as (address,):
            client = await Client.open(address)
            await client.send(b"GET /-/healthy HTTP/1.1\r\nHost: test\r\n\r\n")
            assert (await client.read_answer()).status == 200
        assert await client.read_rest() == b""
        await client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS / 2))


def test_stop_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    host = GatedHost()

    async def main() -> None:
        settings = ServerSettings(addresses=(LOOPBACK,), drain_seconds=0.2)
        recorder = SnapshotRecorder(host)
        async with open_server(open_collector(recorder), recorder, settings) as (address,):
            await host.wait_begun()
            client = await Client.open(address)
            await client.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
            assert (await ask(address, "/-/healthy")).status == 200
        assert await client.read_rest() == b""
        await client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    host.gate.set()
    assert [record.message for record in caplog.records] == ["a snapshot is still under way"]
