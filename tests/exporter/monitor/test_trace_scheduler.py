"""Trace sessions of simulated guests, in virtual time: they find what they should, and cost no more than they may."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from exporter.monitor.trace_budget import Limits
from exporter.monitor.trace_scheduler import WARM_SECONDS, TraceScheduler
from exporter.monitor.trace_session import Subject, run_trace_session
from exporter.monitor.tracked_vcpu import NEWS_QUOTA, ROUTINE_QUOTA, TrackedVcpu
from exporter.stalls.detector import StallDetector
from exporter.stalls.interval import SESSION_SECONDS
from exporter.stalls.verdicts import StallRule, State
from kvm.errors import SourceUnavailable
from kvm.model import NotifyExit, VcpuKey
from tests.exporter.monitor.scene import Scene, play
from tests.exporter.monitor.test_trace_limits import check_duty_cycle
from tests.fake_host import FakeHost, FakeVcpu, FakeVm, R
from tests.virtual_time import run_inline, run_virtual

T = TypeVar("T")


class Occasional(FakeVcpu):
    """When ``occasional``: each notify exit at another RIP, and others between."""

    def act(self) -> list[tuple[int | None, bool]]:
        if self.behaviour != "occasional":
            return super().act()
        return [(R + 16 * (self.notify_exits + 1), True), (5, False)]


class Wanderer(FakeVcpu):
    """When ``wandering``: leaves R for a moment, without a notify exit, each ``stay`` exits."""

    stay = 13

    def act(self) -> list[tuple[int | None, bool]]:
        if self.behaviour != "wandering":
            return super().act()
        return [(R + 256, False)] if self.exits % (self.stay + 1) == self.stay else [(R, True)]


class Ticked(FakeVcpu):
    """When ``slow``: stuck at R, with a notify exit after each ``ticks`` interrupts of the host."""

    ticks = 13

    def act(self) -> list[tuple[int | None, bool]]:
        if self.behaviour != "slow":
            return super().act()
        return [(R, self.exits % self.ticks == 0)]


def make_vm(kind: type[FakeVcpu], pid: int = 100) -> FakeVm:
    vm = FakeVm(f"vm{pid}", pid, 1)
    vm.vcpus = [kind(vcpu.tid) for vcpu in vm.vcpus]
    return vm


def count_lines(caplog: pytest.LogCaptureFixture) -> int:
    return sum("no forward progress" in record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
@pytest.mark.parametrize(("stay", "interval"), [(13, 0.07), (47, 0.02), (11, 0.08)])
def test_a_guest_that_leaves_its_rip_before_a_stall_is_due_is_never_stalled(
    stay: int, interval: float, delay: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def run(call: Callable[[], T]) -> T:
        await asyncio.sleep(delay)
        return call()

    vms = [make_vm(Wanderer, pid) for pid in (100, 200, 300)]

    async def act(scene: Scene) -> None:
        for vm in vms:
            vm.vcpus[0].stay = stay  # type: ignore[attr-defined]
            scene.host.set(vm.vcpus[0], "wandering", interval=interval)
            await asyncio.sleep(0.137)
        await asyncio.sleep(300)
        for vm in vms:
            found = scene.find(vm)
            assert found is not None
            assert (found.verdict.episode, found.traced_exits > 50) == (0, True)

    play(act, *vms, registers=False, run=run)
    assert count_lines(caplog) == 0


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
@pytest.mark.parametrize("every", [2.0, 3.0, 7.0, 15.0, 50.0])
def test_a_stall_is_found_though_the_vcpu_took_notify_exits_now_and_then_before(every: float, trigger: bool) -> None:
    vm = make_vm(Occasional)

    async def act(scene: Scene) -> None:
        for wait in (100.0, 63.3, 71.7, 85.1, 92.9):
            scene.host.set(vm.vcpus[0], "occasional", interval=every)
            await asyncio.sleep(wait)
            scene.host.set(vm.vcpus[0], "stuck")
            assert await scene.wait_for(vm, State.STALLED) < 3
            scene.host.set(vm.vcpus[0], "running")
            await asyncio.sleep(70)

    check_duty_cycle(play(act, vm, trigger=trigger))


@pytest.mark.parametrize("seconds", [6, 60, 300])
def test_a_stall_is_found_though_the_vcpu_has_flooded_before(seconds: float) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "alternating", interval=0.02)
        await asyncio.sleep(seconds)
        scene.host.set(vm.vcpus[0], "stuck")
        assert await scene.wait_for(vm, State.STALLED) < 5

    check_duty_cycle(play(act, vm, trigger=True))


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
@pytest.mark.parametrize(
    ("interval", "within"), [(0.3, 5), (0.6, 10), (0.8, 12), (1.0, 80), (1.3, 150), (1.7, 220), (2.4, 330)]
)
def test_a_slow_stall_is_found_as_soon_as_its_share_allows(interval: float, within: float, trigger: bool) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=interval)
        await scene.wait_for(vm, State.SUSPECT, 20)
        found = scene.find(vm)
        assert found is not None
        assert ("slowly" in found.verdict.reason) == (interval > 0.5)
        await scene.wait_for(vm, State.STALLED, within)

    check_duty_cycle(play(act, vm, trigger=trigger))


class Stuttering(FakeVcpu):
    """When ``stuttering``: stuck at R, with two notify exits at a time."""

    def act(self) -> list[tuple[int | None, bool]]:
        return [(R, True), (R, True)] if self.behaviour == "stuttering" else super().act()


def test_a_stall_whose_exits_come_in_bursts_is_found() -> None:
    """The silence between two bursts is long for how fast the exits in one come."""
    vm = make_vm(Stuttering)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuttering", interval=0.9)
        await scene.wait_for(vm, State.STALLED, 15)

    check_duty_cycle(play(act, vm))


def test_exits_that_are_too_slow_to_be_watched_are_not_watched_and_said_to_be() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=4.5)
        await asyncio.sleep(60)
        armings = scene.monitor.report().armings
        await asyncio.sleep(600)
        found = scene.find(vm)
        assert found is not None
        assert (found.verdict.state, scene.monitor.report().armings) == (State.NOTIFYING, armings)
        assert found.verdict.reason.startswith("it takes notify exits, too slowly to be judged")

    play(act, vm)


def test_interrupts_of_the_host_between_slow_notify_exits_are_no_sign_of_life() -> None:
    vm = make_vm(Ticked)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "slow", interval=0.1)
        await scene.wait_for(vm, State.STALLED, 150)
        armings = scene.monitor.report().armings
        await asyncio.sleep(120)
        assert scene.state(vm) is State.STALLED
        assert scene.monitor.report().armings - armings <= 12
        scene.host.set(vm.vcpus[0], "running")
        assert await scene.wait_for(vm, State.RECOVERED, 15) < 8

    check_duty_cycle(play(act, vm, registers=False))


def test_a_vcpu_that_was_stalled_and_goes_on_is_traced_soon() -> None:
    """Not only when the next session at a stalled vCPU would be due."""
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        for pause in (0.0, 3.0, 7.0):
            await asyncio.sleep(12 + pause)
            scene.host.set(vm.vcpus[0], "running")
            assert await scene.wait_for(vm, State.RECOVERED, 15) < 3
            await asyncio.sleep(70)
            scene.host.set(vm.vcpus[0], "stuck")
            await scene.wait_for(vm, State.STALLED)

    play(act, vm, registers=False)


@pytest.mark.parametrize(("behaviour", "records", "seconds"), [("alternating", 3.0, 0.1), ("others", 3.0, 0.3)])
def test_a_session_at_a_flood_ends_with_the_first_proof(behaviour: str, records: float, seconds: float) -> None:
    vm = FakeVm("flood", 1000, 16)

    async def act(scene: Scene) -> None:
        for vcpu in vm.vcpus:
            scene.host.set(vcpu, behaviour, interval=0.02)
        await asyncio.sleep(60)
        report = scene.monitor.report()
        assert report.armings < 60 * 5
        assert report.records / report.armings <= records

    host = play(act, vm, trigger=True)
    assert sum(ended - began for _, began, ended in host.armed_times) / len(host.armed_times) < seconds


def test_a_stuck_vcpu_that_floods_makes_no_more_records_than_its_pace() -> None:
    vm = FakeVm("flood", 1000, 1)
    read = 0

    async def act(scene: Scene) -> None:
        nonlocal read
        scene.host.set(vm.vcpus[0], "stuck", interval=0.0002)
        await asyncio.sleep(5.5)  # records are counted when a session ends
        read = scene.monitor.report().records

    host = play(act, vm, trigger=True, rule=StallRule(seconds=100.0))
    armed = sum(ended - began for _, began, ended in host.armed_times)
    assert armed > 3
    assert 100 < read / armed <= 64 / 0.1


def test_one_failed_session_does_not_slow_down_those_that_follow(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)
    tid = vm.vcpus[0].tid

    async def act(scene: Scene) -> None:
        host = scene.host
        for _ in range(2):
            host.refused_threads.add(tid)
            host.set(vm.vcpus[0], "stuck")
            await asyncio.sleep(3)
            host.refused_threads.discard(tid)
            await scene.wait_for(vm, State.STALLED, 10)
            await asyncio.sleep(100)
            _, before, after = (began for _, began, _ in host.armed_times[-3:])
            assert after - before == pytest.approx(10, abs=1.5)
            host.set(vm.vcpus[0], "running")
            await asyncio.sleep(100)

    play(act, vm)
    told = [record for record in caplog.records if record.getMessage() == "the exits of a vCPU cannot be traced"]
    assert len(told) == 2


def test_a_tracer_that_fails_for_a_moment_is_soon_tried_again_and_nobody_is_blamed_meanwhile() -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        host = scene.host
        host.refused_threads.add(vm.vcpus[0].tid)
        host.set(vm.vcpus[0], "stuck")
        for _ in range(300):
            await asyncio.sleep(0.01)
            assert scene.monitor.report().problem == ""  # it is this thread alone
        host.refusal = SourceUnavailable("too many events", "raise the limit")
        host.set(other.vcpus[0], "stuck")
        await asyncio.sleep(3)
        assert scene.monitor.report().problem == "too many events; raise the limit"
        host.refusal = None
        assert await scene.wait_for(other, State.STALLED, 20) < 13

    play(act, vm, other)


def test_the_monitor_does_not_spin_while_a_session_lasts_longer_than_the_tracepoint_is_kept() -> None:
    vm = FakeVm("web", 100, 1)
    rounds: list[float] = []

    def read_unix() -> float:
        """The monitor asks for the time of day once a round, for what its log may still have to say."""
        rounds.append(asyncio.get_running_loop().time())
        return 1.8e9

    async def act(scene: Scene) -> None:
        host, vcpu = scene.host, vm.vcpus[0]
        host.set(vcpu, "alternating")
        await asyncio.sleep(1.2)
        host.set(vcpu, "idle")
        await asyncio.sleep(1.0)
        _, _, ended = host.armed_times[-1]
        await asyncio.sleep(ended + WARM_SECONDS - 1.0 - host.clock())
        before = len(rounds)
        host.set(vcpu, "stuck", interval=0.6)
        await asyncio.sleep(4)
        assert host.warm
        assert len(rounds) - before < 30
        host.set(vcpu, "idle")
        await asyncio.sleep(3 * WARM_SECONDS)
        assert not host.warm

    play(act, vm, trigger=True, unix=read_unix)
    assert rounds


def test_exits_that_come_faster_are_news_even_if_no_session_has_seen_that_they_had_slowed_down() -> None:
    vm = FakeVm("web", 100, 1)
    vcpu = follow(vm, 1000.0)
    now, count = 1000.0, 0

    def read(moved: int) -> None:
        nonlocal now, count
        now, count = now + 1.0, count + moved
        vcpu.detector.observe_counter(now, now, count)
        vcpu.see_counts(now, now, count, None)

    for moved in (0, 100, 100):
        read(moved)
    vcpu.begin_session()
    vcpu.in_session = False
    vcpu.plan_next_session(now, now)
    read(100)
    assert (vcpu.moved, vcpu.faster) == (True, False)
    for moved in (0, 0, 0, 1, 0, 0, 0, 0, 1):
        read(moved)
    assert not vcpu.faster
    read(100)
    assert (vcpu.faster, vcpu.wants_session(now)) == (True, True)


def test_older_counts_that_are_handed_over_late_say_nothing() -> None:
    vcpu = follow(FakeVm("web", 100, 1), 1000.0)
    assert vcpu.see_counts(1001.0, 1001.1, 10, 20)
    vcpu.begin_session()
    assert not vcpu.see_counts(1000.5, 1001.2, 9, 18)
    assert not vcpu.moved
    assert not vcpu.see_counts(1002.0, 1002.1, 10, 20)
    assert not vcpu.moved
    assert vcpu.see_counts(1003.0, 1003.1, 11, 21)
    assert vcpu.moved


def test_counts_are_news_where_they_tell_of_a_vcpu_what_was_not_known() -> None:
    vcpu = follow(FakeVm("web", 100, 1), 1000.0)
    rows = [(10, 1000), (12, 3000), (14, 5000), (16, 5010), (18, 5020), (20, 7000)]
    news = []
    for now, (notify_exits, exits) in enumerate(rows, start=1001):
        vcpu.detector.observe_counter(now, now, notify_exits)
        news.append(vcpu.see_counts(now, now, notify_exits, exits))
    assert news == [True, False, False, True, False, True]  # first numbers, hardly any other exits, many again
    assert not vcpu.urgent


def test_the_more_there_is_to_see_the_more_of_its_quota_a_session_may_use_up() -> None:
    vcpu = follow(FakeVm("web", 100, 1), 1000.0)
    parts = [vcpu.quota_part]
    vcpu.detector.observe_records(
        1001.0, [NotifyExit(round(seconds * 1e9), 110, R, 0, 0) for seconds in (1000.1, 1001)]
    )
    parts.append(vcpu.quota_part)
    vcpu.goes_on = True
    parts.append(vcpu.quota_part)
    assert parts == sorted(set(parts))
    assert 6.0 * (1.0 - parts[1]) >= 0.5  # enough to see that it goes on
    assert 6.0 * (1.0 - parts[0]) >= 1.5  # enough to see that it is stuck


def follow(vm: FakeVm, now: float, number: int = 0) -> TrackedVcpu:
    vcpu = vm.read().vcpus[number]
    return TrackedVcpu(VcpuKey(vm.key, vcpu.vcpu_id), vm.vm, vcpu, "bpf", StallDetector(StallRule(), now))


class Bench:
    """TraceScheduler without a monitor: who is traced is up to the test."""

    def __init__(self, host: FakeHost, limits: Limits | None = None) -> None:
        self.scheduler = TraceScheduler(
            host,
            limits or Limits(),
            run_inline,
            is_thread=host.is_thread,
            may_run_tds=lambda: False,
            read=lambda key: None,
            read_cpu_time=None,
            on_change=lambda vcpu, changes: None,
        )

    def follow(self, vm: FakeVm, number: int = 0) -> TrackedVcpu:
        return follow(vm, asyncio.get_running_loop().time(), number)


def run_bench(act: Callable[[FakeHost, Bench], Awaitable[None]], *vms: FakeVm, limits: Limits | None = None) -> None:
    async def main() -> None:
        host = FakeHost(asyncio.get_running_loop().time, *vms)
        bench = Bench(host, limits)
        await bench.scheduler.open()
        living = asyncio.create_task(host.live())
        try:
            await act(host, bench)
        finally:
            await bench.scheduler.close()
            living.cancel()

    run_virtual(main())


def test_who_waits_for_room_is_traced_when_another_session_ends() -> None:
    vm = FakeVm("web", 100, 6)

    async def act(host: FakeHost, bench: Bench) -> None:
        for number, vcpu in enumerate(vm.vcpus):
            host.set(vcpu, "stuck", interval=0.02)
            bench.scheduler.consider(bench.follow(vm, number), host.clock())
        await asyncio.sleep(1)
        assert bench.scheduler.armings == 4
        await asyncio.sleep(6)
        assert bench.scheduler.armings >= 6

    run_bench(act, vm)


def test_one_whose_thread_has_ended_while_it_waited_keeps_nobody_behind_it_waiting() -> None:
    vm = FakeVm("web", 100, 3)

    async def act(host: FakeHost, bench: Bench) -> None:
        first, second, third = [bench.follow(vm, number) for number in range(3)]
        for guest, vcpu in zip(vm.vcpus, (first, second, third), strict=True):
            host.set(guest, "stuck", interval=0.02)
            bench.scheduler.consider(vcpu, host.clock())
        second.vcpu = replace(second.vcpu, tid=None)
        await asyncio.sleep(6)
        assert {tid for tid, _, _ in host.armed_times} == {first.vcpu.tid, third.vcpu.tid}

    run_bench(act, vm, limits=Limits(host=1))


def test_of_one_that_is_dropped_no_session_goes_on_or_begins() -> None:
    vm = FakeVm("web", 100, 2)

    async def act(host: FakeHost, bench: Bench) -> None:
        first, second = bench.follow(vm, 0), bench.follow(vm, 1)
        host.set(vm.vcpus[0], "alternating", interval=0.4)  # the other shows nothing, so its session lasts
        bench.scheduler.consider(first, host.clock())
        await asyncio.sleep(2.0)
        assert not first.in_session
        first.moved = second.moved = True  # a timer is set for the first one's next session
        bench.scheduler.consider(second, host.clock())
        await asyncio.sleep(0.1)
        assert second.in_session
        for vcpu in (first, second):
            bench.scheduler.drop(vcpu.key)
            vcpu.moved = True
        await asyncio.sleep(0.1)
        assert bench.scheduler.armed == 0
        await asyncio.sleep(60)
        assert bench.scheduler.armings == 2

    run_bench(act, vm)


@pytest.mark.parametrize("is_waiting", [False, True])
def test_one_that_was_dropped_and_is_back_is_traced_again(is_waiting: bool) -> None:
    """Whether its old self was being traced, or waited for room: then it waits itself, from when it asks."""
    vm = FakeVm("web", 100, 2)

    async def act(host: FakeHost, bench: Bench) -> None:
        old, other = bench.follow(vm, 0), bench.follow(vm, 1)
        for guest in vm.vcpus:
            host.set(guest, "alternating", interval=0.4)
        for vcpu in (other, old) if is_waiting else (old,):
            bench.scheduler.consider(vcpu, host.clock())
        await asyncio.sleep(0.01)
        assert old.in_session is not is_waiting
        bench.scheduler.drop(old.key)
        if not is_waiting:
            await asyncio.sleep(0.01)  # in which its session ends
        new = bench.follow(vm, 0)
        bench.scheduler.consider(new, host.clock())
        await asyncio.sleep(5.0)
        assert new.detector.traced_exits > 0

    run_bench(act, vm, limits=Limits(host=1))


@pytest.mark.parametrize("news", ["urgent", "faster"])
def test_news_of_one_that_waits_already_count(news: str) -> None:
    """One that has become urgent is traced before others, one whose exits come faster for longer."""
    vm = FakeVm("web", 100, 3)

    async def act(host: FakeHost, bench: Bench) -> None:
        first, second, third = [bench.follow(vm, number) for number in range(3)]
        for guest in vm.vcpus[:2]:
            host.set(guest, "stuck", interval=0.02)
        bench.scheduler.consider(third, host.clock())  # its first session is free
        await asyncio.sleep(SESSION_SECONDS + 0.5)
        third.next_session_at, third.moved = 0.0, True
        for vcpu in (first, second, third):
            bench.scheduler.consider(vcpu, host.clock())
        assert [vcpu.in_session for vcpu in (first, second, third)] == [True, False, False]
        setattr(third, news, True)
        bench.scheduler.consider(third, host.clock())
        await asyncio.sleep(12.0)
        sessions = [(tid, ended - began) for tid, began, ended in host.armed_times]
        third_tid = vm.vcpus[2].tid
        assert sessions[1][0] == first.vcpu.tid
        assert [tid for tid, _ in sessions].index(third_tid, 1) == (2 if news == "urgent" else 3)
        part = NEWS_QUOTA if news == "faster" else ROUTINE_QUOTA
        quota = Limits().duty_cycle * Limits().window_seconds * part
        assert [seconds for tid, seconds in sessions if tid == third_tid] == [
            pytest.approx(SESSION_SECONDS, abs=0.1),
            pytest.approx(min(SESSION_SECONDS, quota), abs=0.1),
        ]

    run_bench(act, vm, limits=Limits(host=1))


def test_a_vm_that_has_ended_is_not_traced_again() -> None:
    vm = FakeVm("web", 100, 6)

    async def act(host: FakeHost, bench: Bench) -> None:
        followed = [bench.follow(vm, number) for number in range(6)]
        for vcpu in followed:
            bench.scheduler.consider(vcpu, host.clock())
        await asyncio.sleep(5.5)
        for vcpu in followed:
            vcpu.moved = True
        bench.scheduler.forget(vm.key)
        await asyncio.sleep(0.1)
        armings = bench.scheduler.armings
        await asyncio.sleep(100)
        assert (bench.scheduler.armings, bench.scheduler.armed) == (armings, 0)

    run_bench(act, vm)


@pytest.mark.parametrize("cancelled", ["arming", "disarming"])
def test_what_a_worker_has_armed_is_disarmed_though_the_session_is_cancelled_twice(cancelled: str) -> None:
    vm = FakeVm("web", 100, 1)

    async def main() -> None:
        host = FakeHost(asyncio.get_running_loop().time, vm)
        gate, calls = asyncio.Event(), 0

        async def run(call: Callable[[], T]) -> T:
            nonlocal calls
            calls += 1
            if calls == (1 if cancelled == "arming" else 2):
                await asyncio.shield(gate.wait())
            return call()

        detector = StallDetector(StallRule(), host.clock())
        subject = Subject(vm.vcpus[0].tid, detector, lambda: True, None, None, lambda changes: None)
        session = asyncio.create_task(run_trace_session(subject, host, run, 0.5))
        await asyncio.sleep(1.0)
        for _ in range(2):
            session.cancel()
            await asyncio.sleep(0.01)
        assert not session.done()  # so whoever closes waits for the worker
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await session
        assert vm.vcpus[0].armed == []

    run_virtual(main())


def test_records_that_are_odd_are_counted_as_lost_and_prove_nothing() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.garbles = True
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(8)
        assert scene.monitor.report().lost_records > 0
        assert scene.state(vm) is State.NOTIFYING

    play(act, vm)
