"""The status page over HTTP: who gets what, and that it costs no more the more people look."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from exporter import status_pages
from exporter.lately import Lately
from exporter.listen import Address, TcpAddress
from exporter.server import ServerSettings, open_server
from exporter.status_pages import SEARCH_BURST, Budget
from exporter.verdicts import State
from kvm.model import Snapshot, SnapshotReader
from tests.snapshots import make_snapshot
from tests.status_hosts import FixedHost, FixedWatcher, make_reports, make_vm_reading, open_collector
from tests.test_server import PATIENCE_SECONDS, Answer, Client, GatedHost, wait_ready

Scenario = Callable[[Address], Awaitable[None]]
READINGS = [make_vm_reading("web", 1), make_vm_reading("db", 2)]


def run(scenario: Scenario, host: SnapshotReader, watcher: FixedWatcher | None = None) -> None:
    async def main() -> None:
        lately, settings = Lately(host), ServerSettings(addresses=(TcpAddress("127.0.0.1", 0),))
        async with open_server(open_collector(lately), lately, settings, watcher=watcher) as (address,):
            await asyncio.wait_for(scenario(address), PATIENCE_SECONDS)

    asyncio.run(main())


async def ask(address: Address, target: str = "/-/status", **headers: str) -> Answer:
    client = await Client.open(address)
    lines = "".join(
        f"{name.replace('_', '-')}: {value}\r\n" for name, value in ({"Host": "localhost"} | headers).items()
    )
    await client.send(f"GET {target} HTTP/1.1\r\nConnection: close\r\n{lines}\r\n".encode())
    answer = await client.read_answer("HEAD" if "If_None_Match" in headers else "GET")
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


def test_what_has_not_changed_is_not_sent_again() -> None:
    host = FixedHost(make_snapshot(*READINGS))

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        first = await ask(address)
        again = await ask(address, If_None_Match=first.headers["ETag"])
        assert again.status in (200, 304)  # 200 where the plots' edge has moved on meanwhile
        if again.status == 304:
            assert again.headers["ETag"] == first.headers["ETag"]
        other = await ask(address, If_None_Match='"another"')
        assert other.status == 200

    run(scenario, host, FixedWatcher())


def test_many_who_look_cost_as_much_as_one(tell: Callable[[str], None]) -> None:
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher(*make_reports(READINGS, State.STALLED))

    async def scenario(address: Address) -> None:
        await wait_ready(address)
        loop = asyncio.get_running_loop()
        began, looks, asked = loop.time(), host.looks, watcher.asked
        for _ in range(10):
            answers = await asyncio.gather(*(ask(address, target) for target in ["/", "/-/status"] * 20))
            assert {answer.status for answer in answers} == {200}
        seconds = loop.time() - began
        counts = f"{host.looks - looks} looks at the host, {watcher.asked - asked} reports of the watch"
        tell(f"status page asked 400 times in {seconds:.1f} s: {counts}")
        assert host.looks - looks <= 1 + seconds / status_pages.LOOK_SECONDS
        assert watcher.asked - asked <= 2 + seconds / status_pages.PICTURE_SECONDS

    run(scenario, host, watcher)


def test_ever_new_searches_are_turned_away_and_nobody_else_is() -> None:
    async def scenario(address: Address) -> None:
        await wait_ready(address)
        stranger = {"Host": "hv-17.example"}
        statuses: list[int] = []
        while len(statuses) < 500 and 503 not in statuses:
            refused = await ask(address, f"/?q=random{len(statuses)}", **stranger)
            statuses.append(refused.status)
        assert statuses[-1] == 503
        assert refused.headers["Retry-After"] == "1"
        assert (await ask(address, "/", **stranger)).status == 200
        assert (await ask(address, "/-/status", **stranger)).status == 200
        assert (await ask(address, "/?q=web")).status == 200  # who is here has a budget of his own

    run(scenario, FixedHost(make_snapshot(*READINGS)), FixedWatcher())


def test_a_budget_comes_back() -> None:
    now = [0.0]
    budget = Budget(10.0, SEARCH_BURST, lambda: now[0])
    assert [budget.take() for _ in range(25)] == [True] * 20 + [False] * 5
    now[0] = 0.35
    assert [budget.take() for _ in range(5)] == [True] * 3 + [False] * 2


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


def test_a_look_that_hangs_does_not_hold_the_page_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_pages, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(status_pages, "LOOK_WAIT_SECONDS", 0.01)
    host = GatedHost()

    async def scenario(address: Address) -> None:
        await host.pass_first_look(address)
        assert b"simulated" in (await ask(address)).body
        await host.wait_begun()
        assert b"simulated" in (await ask(address, "/?q=web")).body
        assert not host.begun.acquire(blocking=False)  # one look at a time
        host.gate.set()

    run(scenario, host, FixedWatcher())


class CountingHost(FixedHost):
    """Tells when it has been looked at a third time."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.third = threading.Event()

    def read(self) -> Snapshot:
        snapshot = super().read()
        if self.looks >= 3:
            self.third.set()
        return snapshot


def test_while_something_happens_the_history_is_kept_though_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_pages, "SAMPLE_SECONDS", 0.01)
    host = CountingHost(make_snapshot(*READINGS))

    async def scenario(address: Address) -> None:
        assert address
        assert await asyncio.to_thread(host.third.wait, PATIENCE_SECONDS)

    run(scenario, host, FixedWatcher(*make_reports(READINGS, State.NOTIFYING)))


def test_while_nothing_happens_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_pages, "SAMPLE_SECONDS", 0.01)
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher(*make_reports(READINGS, State.QUIET))

    async def scenario(address: Address) -> None:
        while watcher.asked < 5:
            await asyncio.sleep(0.01)
        assert address
        assert host.looks == 1

    run(scenario, host, watcher)


def test_a_watch_that_fails_costs_the_page_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
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
        assert watcher.asked - asked <= 2 + seconds / status_pages.PICTURE_SECONDS
        tell(f"status page asked by 300 clients that hang up in {seconds:.1f} s: {watcher.asked - asked} reports")

    run(scenario, host, watcher)
