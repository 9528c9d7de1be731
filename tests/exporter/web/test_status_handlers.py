"""The status page over HTTP: who gets what, and that it costs no more the more people read."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from exporter.history.rates import WINDOW_SECONDS
from exporter.history.recorder import SnapshotRecorder
from exporter.logs.rate_limit import RateLimitedLog
from exporter.stalls.verdicts import MonitorReport, State
from exporter.status_page import page
from exporter.status_page.page import Frame
from exporter.web.access import Identity, identify
from exporter.web.connection_guard import ConnectionGuard
from exporter.web.cpu_budget import Budget
from exporter.web.listeners import Address, TcpAddress, UnixAddress
from exporter.web.metrics_handler import Handler
from exporter.web.server import open_server
from exporter.web.settings import VCPUS_PATH, ServerSettings, StatusLimits
from exporter.web.status_handlers import StatusHandlers
from kvm.model import Snapshot, SnapshotReader
from tests.exporter.web.test_server import Answer, Client, GatedHost, wait_ready
from tests.reports import make_report
from tests.snapshots import make_snapshot
from tests.status_hosts import FixedHost, FixedWatcher, make_reports, make_vm_reading, open_collector
from tests.waiting import PATIENCE_SECONDS

Scenario = Callable[[Address], Awaitable[None]]
USUAL = StatusLimits()
SAMPLED = StatusLimits(sample_seconds=0.01)
READINGS = [make_vm_reading("web", 1), make_vm_reading("db", 2)]


def run(
    scenario: Scenario,
    host: SnapshotReader,
    watcher: FixedWatcher | None = None,
    limits: StatusLimits = USUAL,
) -> None:
    async def main() -> None:
        # The test is the agent's own user, so that the agent knows it at the socket.
        recorder = SnapshotRecorder(host)
        settings = ServerSettings(addresses=(UnixAddress(f"{directory}/socket"),), status=limits)
        async with open_server(open_collector(recorder), recorder, settings, watcher=watcher) as (address,):
            await asyncio.wait_for(scenario(address), PATIENCE_SECONDS)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main())


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = time.monotonic()

    def __call__(self) -> float:
        return self.seconds


@asynccontextmanager
async def open_pages(pages: StatusHandlers) -> AsyncIterator[Address]:
    """Serve the pages alone, to clients that are known; who hangs up is not answered on."""
    guard = ConnectionGuard()

    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        guard.begin(request.transport)
        try:
            with identify(Identity.SOCKET):
                return await handler(request)
        finally:
            guard.end(request.transport)

    app = web.Application(middlewares=[frame])
    app.router.add_get("/", pages.answer_page)
    app.router.add_get("/-/status", pages.answer_parts)
    app.cleanup_ctx.append(pages.run)
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    server = await asyncio.get_running_loop().create_server(guard.wrap(runner.server), "127.0.0.1", 0)
    try:
        yield TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await runner.server.shutdown(0.0)
        await runner.cleanup()


def run_pages(
    scenario: Scenario,
    host: SnapshotReader | None = None,
    watcher: FixedWatcher | None = None,
    clock: Callable[[], float] = time.monotonic,
    limits: StatusLimits = USUAL,
    *,
    render_parts: Callable[..., str] = page.render_parts,
) -> None:
    async def main() -> None:
        recorder = SnapshotRecorder(host or FixedHost(make_snapshot(*READINGS)))
        frame = Frame("", "", "hv-17", {})
        pages = StatusHandlers(
            recorder,
            watcher,
            frame,
            RateLimitedLog(),
            clock=clock,
            unix_clock=lambda: 1.7e9,
            limits=limits,
            render_parts=render_parts,
        )
        async with open_pages(pages) as address:
            await asyncio.wait_for(scenario(address), PATIENCE_SECONDS)

    asyncio.run(main())


async def ask(address: Address, target: str = "/-/status", **headers: str) -> Answer:
    client = await Client.open(address)
    lines = "".join(
        f"{name.replace('_', '-')}: {value}\r\n" for name, value in ({"Host": "localhost"} | headers).items()
    )
    await client.send(f"GET {target} HTTP/1.1\r\nConnection: close\r\n{lines}\r\n".encode())
    try:
        answer = await client.read_answer("HEAD" if "If_None_Match" in headers else "GET")
    finally:
        await client.close()
    return answer


def test_clients_here_see_names_and_others_do_not() -> None:
    async def scenario(address: Address) -> None:
        await wait_ready(address)
        for target in ("/", "/-/status"):
            assert b"owner-of-web" in (await ask(address, target)).body
            assert b"owner-of-web" not in (await ask(address, target, Host="hv-17.example")).body
            assert b"owner-of-web" not in (await ask(address, target, Via="1.1 proxy")).body

    run(scenario, FixedHost(make_snapshot(*READINGS)), FixedWatcher(*make_reports(READINGS, State.STALLED)))


STRANGER = {"Host": "hv-17.example"}


@pytest.mark.parametrize("query", ["web", "owner-of-web", "0xffffffff81012345"])
def test_a_stranger_finds_nothing_by_what_strangers_do_not_see(query: str) -> None:
    async def scenario(address: Address) -> None:
        for target in ("/", "/-/status"):
            assert b"is-stalled" in (await ask(address, f"{target}?q={query}")).body.split(b"</style>")[-1]
            found = await ask(address, f"{target}?q={query}", **STRANGER)
            assert b"<tbody role" not in found.body
            assert b"Nothing matches" in found.body

    run_pages(scenario, watcher=FixedWatcher(*make_reports(READINGS, State.STALLED)))


def test_who_speaks_http_1_0_may_be_a_proxy() -> None:
    async def scenario(address: Address) -> None:
        for target in ("/", "/-/status", VCPUS_PATH):
            client = await Client.open(address)
            await client.send(f"GET {target} HTTP/1.0\r\nHost: 127.0.0.1:9750\r\n\r\n".encode())
            answer = await client.read_rest()
            assert answer.startswith(b"HTTP/1.0 200 ")
            assert b"uuid-1" in answer
            assert b"owner-of-web" not in answer
            await client.close()

    run(scenario, FixedHost(make_snapshot(*READINGS)), FixedWatcher(*make_reports(READINGS, State.STALLED)))


def test_what_has_not_changed_is_not_sent_again() -> None:
    clock, watcher = Clock(), FixedWatcher(*make_reports(READINGS, State.PROGRESSING))

    async def scenario(address: Address) -> None:
        first = await ask(address)
        again = await ask(address, If_None_Match=first.headers["ETag"])
        assert (again.status, again.headers["ETag"]) == (304, first.headers["ETag"])
        assert (await ask(address, If_None_Match='"another"')).status == 200
        watcher.watch_report = replace(watcher.watch_report, vcpus=make_reports(READINGS, State.SUSPECT))
        clock.seconds += 3
        changed = await ask(address, If_None_Match=first.headers["ETag"])
        assert changed.status == 200
        assert changed.headers["ETag"] != first.headers["ETag"]

    run_pages(scenario, watcher=watcher, clock=clock, limits=StatusLimits(view_seconds=0.0))


def test_no_answer_is_kept_framed_or_read_by_others_nor_runs_anything() -> None:
    async def scenario(address: Address) -> None:
        page, parts = await ask(address, "/"), await ask(address)
        unchanged = await ask(address, If_None_Match=parts.headers["ETag"])
        assert unchanged.status == 304
        for answer in (page, parts, unchanged):
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["Referrer-Policy"] == "no-referrer"

    run_pages(scenario, clock=Clock())


def test_many_readers_cost_as_much_as_one(tell: Callable[[str], None]) -> None:
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher(*make_reports(READINGS, State.STALLED))

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        loop = asyncio.get_running_loop()
        began, looks, asked = loop.time(), host.looks, watcher.asked
        for _ in range(10):
            answers = await asyncio.gather(*(ask(address, target) for target in ["/", "/-/status"] * 20))
            assert {answer.status for answer in answers} == {200}
        seconds = loop.time() - began
        counts = f"{host.looks - looks} snapshots, {watcher.asked - asked} reports of the monitor"
        tell(f"status page asked 400 times in {seconds:.1f} s: {counts}")
        assert host.looks - looks <= 1 + seconds / USUAL.snapshot_seconds
        assert watcher.asked - asked <= 2 + seconds / USUAL.view_seconds

    run(scenario, host, watcher)


def test_ever_new_searches_are_turned_away_and_nobody_else_is() -> None:
    limits = StatusLimits(search_burst_seconds=0.02, search_share=1e-6, answers=500)

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        statuses: list[int] = []
        while len(statuses) < 500 and 503 not in statuses:
            refused = await ask(address, f"/?q=random{len(statuses)}", **STRANGER)
            statuses.append(refused.status)
        assert statuses[-1] == 503
        assert refused.headers["Retry-After"] == "1"
        assert (await ask(address, "/", **STRANGER)).status == 200
        assert (await ask(address, "/-/status", **STRANGER)).status == 200
        assert (await ask(address, "/?q=web")).status == 200  # who is here has a budget of his own

    run(scenario, FixedHost(make_snapshot(*READINGS)), FixedWatcher(), limits)


def test_a_budget_comes_back() -> None:
    clock = Clock()
    budget = Budget(0.05, 0.5, clock)
    budget.spend(0.4)
    assert budget.is_left
    budget.spend(0.2)
    assert not budget.is_left
    clock.seconds += 1.9
    assert not budget.is_left  # what was spent too much has to come back first
    clock.seconds += 0.2
    assert budget.is_left
    clock.seconds += 1000
    assert budget.is_left
    budget.spend(0.51)  # a pause saves up so much and no more
    assert not budget.is_left


def test_answers_are_kept_for_a_moment_and_in_bounds() -> None:

    async def scenario(address: Address) -> None:
        assert [(await ask(address, f"/?q=x{number}")).status for number in range(6)] == [200] * 5 + [503]
        assert (await ask(address, "/?q=x0")).status == 200
        assert (await ask(address, "/")).status == 200  # which is not for those who search to use up
        while (await ask(address, "/?q=another")).status == 503:
            await asyncio.sleep(0.02)

    run_pages(scenario, limits=StatusLimits(answers=5, view_seconds=2.0))


class MeetingRenderer:
    """Counts what it renders, and how many meet another one that is under way at once: each waits a while for that."""

    def __init__(self) -> None:
        self.begun = self.met = 0
        self._together = threading.Barrier(2)

    def render_parts(self, *_arguments: object) -> str:
        self.begun += 1
        try:
            self._together.wait(0.05)
            self.met += 1
        except threading.BrokenBarrierError:  # alone
            self._together.reset()
        return "rendered"


def test_who_asks_the_same_gets_the_same_and_one_is_rendered_at_a_time() -> None:
    renderer = MeetingRenderer()

    async def scenario(address: Address) -> None:
        answers = await asyncio.gather(*(ask(address, f"/-/status?q=x{number % 4}") for number in range(20)))
        assert {answer.body for answer in answers} == {b"rendered"}
        assert (renderer.begun, renderer.met) == (4, 0)

    # What it renders is pure and has tests of its own; here only when, and beside what, matters.
    run_pages(scenario, limits=StatusLimits(view_seconds=PATIENCE_SECONDS), render_parts=renderer.render_parts)


def test_what_costs_more_than_its_share_is_put_together_less_often() -> None:
    clock, watcher = Clock(), FixedWatcher()

    async def scenario(address: Address) -> None:
        for pause, asked in ((0.0, 1), (1.9, 1), (0.2, 2)):
            clock.seconds += pause
            await ask(address, f"/-/status?q=x{pause}")
            assert watcher.asked == asked

    run_pages(scenario, watcher=watcher, clock=clock, limits=StatusLimits(view_share=1e-9, max_view_seconds=2.0))


def test_a_client_that_hangs_up_takes_nobodys_answer_away() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        first = await Client.open(address)
        await first.send(b"GET /-/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await host.wait_begun()
        second = asyncio.create_task(ask(address))
        await asyncio.sleep(0.05)
        first.writer.transport.abort()
        await asyncio.sleep(0.05)
        host.gate.set()
        assert (await second).status == 200

    run_pages(scenario, host, limits=StatusLimits(snapshot_wait_seconds=PATIENCE_SECONDS))


@pytest.mark.parametrize(
    "query", ["%00", "%ff%fe", "%ED%A0%80", "a&q=b", "%3Cscript%3Ealert(1)%3C/script%3E", "x" * 3000]
)
def test_any_query_is_answered(query: str) -> None:
    async def scenario(address: Address) -> None:
        await wait_ready(address)
        for target in (f"/?q={query}", f"/-/status?q={query}", f"/?refresh=1&q={query}"):
            answer = await ask(address, target)
            assert answer.status == 200
            assert answer.body.decode().count("<script>") == target.startswith("/?")
            assert len(answer.body) < 40_000

    run(scenario, FixedHost(make_snapshot(*READINGS)), FixedWatcher())


def test_a_snapshot_that_hangs_does_not_hold_the_page_up() -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        assert b"simulated" in (await ask(address)).body
        await host.wait_begun()
        assert b"simulated" in (await ask(address, "/?q=web")).body
        assert not host.begun.acquire(blocking=False)  # one snapshot at a time
        host.gate.set()

    run(scenario, host, FixedWatcher(), StatusLimits(snapshot_seconds=0.0, snapshot_wait_seconds=0.01))


def test_a_snapshot_that_hangs_holds_up_all_who_ask_together_and_not_in_turn(tell: Callable[[str], None]) -> None:
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_snapshot(address)
        loop = asyncio.get_running_loop()
        await asyncio.sleep(USUAL.snapshot_seconds)
        began = loop.time()
        searches = [ask(address, f"/-/status?q=random{number}", **STRANGER) for number in range(20)]
        answers = await asyncio.gather(ask(address, "/"), ask(address), *searches)
        seconds = loop.time() - began
        assert [answer.status for answer in answers[:2]] == [200, 200]
        statuses = [answer.status for answer in answers[2:]]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) == USUAL.searches
        assert seconds < 1
        began = loop.time()
        assert (await ask(address, "/?refresh=1")).status == 200
        assert loop.time() - began < 0.4  # this snapshot has been waited for
        tell(f"while a snapshot hangs, 22 different questions are answered within {seconds:.2f} s")
        host.gate.set()

    run(scenario, host, FixedWatcher())


class CountingHost(FixedHost):
    """Tells when it has been read a third time."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.third = threading.Event()

    def read(self) -> Snapshot:
        snapshot = super().read()
        if self.looks >= 3:
            self.third.set()
        return snapshot


def test_while_something_happens_the_history_is_kept_though_nobody_asks() -> None:
    host = CountingHost(make_snapshot(*READINGS))

    async def scenario(address: Address) -> None:
        assert address
        assert await asyncio.to_thread(host.third.wait, PATIENCE_SECONDS)

    run(scenario, host, FixedWatcher(*make_reports(READINGS, State.NOTIFYING)), SAMPLED)


@pytest.mark.parametrize("reason", ["quiet", "drill", "paused", "lost"])
def test_while_nothing_happens_nobody_reads(reason: str) -> None:
    (paused,) = make_reports(READINGS[:1], State.UNKNOWN, now=time.monotonic() - WINDOW_SECONDS)
    (lost,) = make_reports(READINGS[:1], State.CONTEXT_LOST, now=time.monotonic() - WINDOW_SECONDS)
    vcpus = {
        "quiet": make_reports(READINGS, State.QUIET),
        "drill": (make_report(State.STALLED, drill=True),),
        "paused": (paused,),
        "lost": (lost,),
    }
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher(*vcpus[reason])

    async def scenario(address: Address) -> None:
        while watcher.asked < 5:
            await asyncio.sleep(0.01)
        assert address
        assert host.looks == 1

    run(scenario, host, watcher, SAMPLED)


def test_a_monitor_that_fails_once_does_not_end_the_history() -> None:
    class FailingOnce(FixedWatcher):
        def report(self) -> MonitorReport:
            report = super().report()
            if self.asked == 1:
                raise RuntimeError("not now")
            return report

    host = CountingHost(make_snapshot(*READINGS))

    async def scenario(address: Address) -> None:
        assert address
        assert await asyncio.to_thread(host.third.wait, PATIENCE_SECONDS)

    run(scenario, host, FailingOnce(*make_reports(READINGS, State.NOTIFYING)), SAMPLED)


def test_a_monitor_that_fails_costs_the_page_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    class FailingWatcher(FixedWatcher):
        def report(self) -> object:  # type: ignore[override]
            raise RuntimeError("secret detail")

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        answer = await ask(address)
        assert (answer.status, b"secret" in answer.body) == (500, False)
        assert (await ask(address, "/-/healthy")).status == 200

    run(scenario, FixedHost(make_snapshot(*READINGS)), FailingWatcher())
    assert "request failed" in [record.message for record in caplog.records]


def test_clients_that_hang_up_cause_no_more_work(tell: Callable[[str], None]) -> None:
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher()

    async def hang_up(address: Address) -> None:
        client = await Client.open(address)
        await client.send(b"GET /-/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.writer.transport.abort()

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        loop = asyncio.get_running_loop()
        began, asked = loop.time(), watcher.asked
        for _ in range(300):
            await hang_up(address)
        assert (await ask(address)).status == 200
        seconds = loop.time() - began
        assert watcher.asked - asked <= 2 + seconds / USUAL.view_seconds
        tell(f"status page asked by 300 clients that hang up in {seconds:.1f} s: {watcher.asked - asked} reports")

    run(scenario, host, watcher)
