"""Reading the whole host: when it is due, what a failure costs, and what becomes of what is missing."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from dataclasses import replace

import pytest

from exporter.monitor.backends import PollMode
from exporter.monitor.thread_index import STRANGER_SECONDS, UNPLACED_CALLS
from exporter.stalls.verdicts import State
from kvm.bpf.notify_trigger import NotifyCall, VcpuThread
from kvm.model import Protection
from tests.exporter.monitor.scene import Scene, play, read_lines
from tests.fake_host import FakeHost, FakeVm
from tests.snapshots import INTEL


def test_while_nothing_happens_nothing_is_armed_and_polls_are_slow() -> None:
    vm = FakeVm("web", 100, 4)

    async def act(scene: Scene) -> None:
        polls = len(scene.host.polls)
        await asyncio.sleep(3600)
        report = scene.monitor.report()
        assert (report.trigger, report.poll_period_seconds, report.armings) == ("bpf", 10.0, 0)
        assert len(scene.host.polls) - polls == pytest.approx(360, abs=1)
        assert report.trigger_missed == 0
        assert not scene.host.warm

    play(act, vm, trigger=True)


@pytest.mark.parametrize(
    ("supported", "protection", "vcpus", "poll", "period", "polls"),
    [
        (True, Protection.ARMED, 4, PollMode.AUTO, 1.0, 600),
        (True, Protection.UNKNOWN, 4, PollMode.AUTO, 1.0, 600),
        (True, Protection.ARMED, 3000, PollMode.AUTO, 3.0, 40),
        (True, Protection.OFF, 4, PollMode.AUTO, 0.0, 60),
        (False, Protection.UNSUPPORTED, 4, PollMode.AUTO, 0.0, 2),
        (False, Protection.UNSUPPORTED, 4, PollMode.ALWAYS, 1.0, 600),
    ],
)
def test_only_what_can_move_is_polled(
    supported: bool, protection: Protection, vcpus: int, *, poll: PollMode, period: float, polls: int
) -> None:
    vm = FakeVm("web", 10_000, vcpus)
    vm.protection = protection

    def prepare(host: FakeHost) -> None:
        host.host = replace(INTEL, notify_supported=supported)

    async def act(scene: Scene) -> None:
        before = len(scene.host.polls)
        await asyncio.sleep(120 if vcpus > 100 else 600)
        assert scene.monitor.report().poll_period_seconds == period
        assert len(scene.host.polls) - before == pytest.approx(polls, abs=2)

    play(act, vm, poll=poll, prepare=prepare)


def test_where_kvm_is_not_loaded_it_is_looked_for_every_few_seconds() -> None:
    def unload(host: FakeHost) -> None:
        host.host = replace(INTEL, kvm_module="", notify_supported=None)

    async def act(scene: Scene) -> None:
        before = len(scene.host.polls)
        await asyncio.sleep(600)
        assert len(scene.host.polls) - before == pytest.approx(150, abs=2)

    play(act, prepare=unload)


@pytest.mark.parametrize(("poll", "period"), [(PollMode.AUTO, 10.0), (PollMode.ALWAYS, 1.0)])
@pytest.mark.parametrize("protection", [Protection.ARMED, Protection.OFF])
def test_always_means_always_with_a_trigger_too(protection: Protection, poll: PollMode, period: float) -> None:
    vm = FakeVm("web", 100, 1)
    vm.protection = protection

    async def act(scene: Scene) -> None:
        before = len(scene.host.polls)
        await asyncio.sleep(600)
        assert len(scene.host.polls) - before == pytest.approx(600 / period, abs=2)

    play(act, vm, trigger=True, poll=poll)


def test_a_vm_that_came_after_the_newest_snapshot_is_found_by_its_first_call() -> None:
    async def act(scene: Scene) -> None:
        await asyncio.sleep(100)
        vm = FakeVm("new", 300, 1)
        scene.host.vms.append(vm)
        scene.host.set(vm.vcpus[0], "stuck")
        assert await scene.wait_for(vm, State.SUSPECT) < 0.2

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_a_vm_that_is_missing_for_a_moment_keeps_its_verdict_and_one_that_stays_away_is_forgotten() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        scene.host.set(vm.vcpus[0], "idle")
        scene.host.vms.remove(vm)
        await asyncio.sleep(30)
        scene.host.vms.append(vm)
        await asyncio.sleep(60)
        assert scene.state(vm) is State.UNKNOWN
        scene.host.vms.remove(vm)
        await asyncio.sleep(90)
        assert scene.monitor.report().vcpus == ()
        scene.host.vms.append(vm)

    play(act, vm)


def test_what_goes_wrong_is_logged_and_the_monitor_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        vms, scene.host.vms = scene.host.vms, [None]  # type: ignore[list-item]
        await asyncio.sleep(5)
        scene.host.vms = vms
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)

    play(act, vm)
    assert any("goes on" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
def test_cpu_time_that_fails_costs_the_stall_nothing_and_is_not_tried_without_end(
    registers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vm, rounds = FakeVm("web", 100, 1), Counter[str]()

    def read_unix() -> float:
        rounds["all"] += 1  # the monitor asks for the time of day once a round
        return 1.8e9

    def prepare(host: FakeHost) -> None:
        host.cpu_time_fails = True

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        before = rounds["all"]
        await asyncio.sleep(20)
        assert rounds["all"] - before < 100

    play(act, vm, registers=registers, prepare=prepare, unix=read_unix)
    assert 1 <= find_errors(caplog).count("RuntimeError('no CPU time')") <= 5
    assert set(find_errors(caplog)) == {"RuntimeError('no CPU time')"}


def find_errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.fields["err"] for record in caplog.records if record.levelno >= logging.ERROR]  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_first", [False, True], ids=["later", "from-the-start"])
@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_reader_that_fails_is_asked_seldom_and_complained_about_when_the_reason_changes(
    trigger: bool, is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vm = FakeVm("web", 100, 1)

    def prepare(host: FakeHost) -> None:
        host.failure = "no memory" if is_first else ""

    async def act(scene: Scene) -> None:
        scene.host.failure = "no memory"
        scene.monitor.take_call(NotifyCall(1, 4242, 5000, 0))
        await asyncio.sleep(100)
        polls = len(scene.host.polls)
        assert polls < 18
        assert find_errors(caplog) == ["RuntimeError('no memory')"]
        scene.host.failure = "no fds"
        await asyncio.sleep(100)
        assert len(scene.host.polls) - polls <= 11
        assert find_errors(caplog) == ["RuntimeError('no memory')", "RuntimeError('no fds')"]
        scene.host.failure = ""
        await asyncio.sleep(11)
        scene.host.set(vm.vcpus[0], "stuck")
        assert await scene.wait_for(vm, State.STALLED) < 3

    play(act, vm, trigger=trigger, prepare=prepare)
    assert any(record.getMessage() == "the stall monitor works again" for record in caplog.records)


def test_what_does_not_need_the_reader_goes_on_where_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await scene.monitor.start_drill("db")
        trigger.invalid = {VcpuThread(*vm.key[:2], 110, 0): 3}
        scene.host.failure = "no memory"
        scene.host.end(vm)
        await asyncio.sleep(0.1)
        assert scene.monitor.report().context_invalid == {}
        await asyncio.sleep(62)
        assert scene.monitor.report().vcpus == ()
        assert not scene.host.warm

    play(act, vm, other, trigger=True)
    assert read_lines(caplog)[-1]["msg"] == "DRILL, not real: vCPU makes progress again"


def test_many_that_are_active_are_read_with_the_host_and_not_singly_besides() -> None:
    vm, others = FakeVm("web", 100, 40), [FakeVm(f"vm{number}", 10_000 * (number + 1), 1000) for number in range(5)]

    async def act(scene: Scene) -> None:
        for vcpu in vm.vcpus:
            scene.host.set(vcpu, "alternating", interval=0.2)
        await asyncio.sleep(3)
        scene.host.reads.clear()
        await asyncio.sleep(10)
        at_once = Counter(seconds for seconds, _, _ in scene.host.reads)
        assert max(at_once.values(), default=0) <= 4  # by trace sessions

    play(act, vm, *others)


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_stall_whose_counters_cannot_be_read_any_more_is_unknown(trigger: bool, registers: bool) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        vm.is_readable = False
        scene.host.set(vm.vcpus[0], "idle")
        assert await scene.wait_for(vm, State.UNKNOWN, 15) < 8
        await asyncio.sleep(900)
        assert scene.state(vm) is State.UNKNOWN  # and not forgotten: it is there

    play(act, vm, trigger=trigger, registers=registers)


def test_a_stall_is_unknown_where_the_host_cannot_be_read_any_more() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        scene.host.failure = "no memory"
        scene.host.set(vm.vcpus[0], "idle")
        assert await scene.wait_for(vm, State.UNKNOWN, 15) < 12

    play(act, vm, registers=False)


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_vcpu_that_is_unplugged_is_forgotten_after_a_minute(
    trigger: bool, registers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vm = FakeVm("web", 100, 2)

    async def act(scene: Scene) -> None:
        for vcpu in reversed(vm.vcpus):
            scene.host.set(vcpu, "stuck")
            await asyncio.sleep(5)
        assert [scene.state(vm, vcpu) for vcpu in (0, 1)] == [State.STALLED] * 2
        if scene.host.trigger is not None:
            threads = [VcpuThread(*vm.key[:2], vcpu.tid, 2 * number) for number, vcpu in enumerate(vm.vcpus)]
            scene.host.trigger.invalid = dict.fromkeys(threads, 1)
        scene.host.dead_threads.add(vm.vcpus.pop().tid)
        await asyncio.sleep(30)
        assert scene.state(vm, 1) in (State.UNKNOWN, *([State.CONTEXT_LOST] if trigger else []))
        await asyncio.sleep(45)
        assert scene.find(vm, 1) is None
        assert scene.state(vm) is State.STALLED
        if scene.host.trigger is not None:
            assert set(scene.host.trigger.invalid) == {threads[0]}

    play(act, vm, trigger=trigger, registers=registers)
    assert [line["vcpu"] for line in read_lines(caplog) if line["msg"] == "vCPU is gone"] == [1]


def test_calls_of_threads_that_nobody_knows_are_counted_as_lost() -> None:
    async def act(scene: Scene) -> None:
        for number in range(1000):
            scene.monitor.take_call(NotifyCall(1, 4242, 5000 + number, 0))
        assert scene.monitor.report().lost_records == 1000 - UNPLACED_CALLS
        await asyncio.sleep(3)
        assert scene.monitor.report().lost_records == 1000

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_a_thread_that_cannot_be_placed_has_the_host_read_twice_a_minute_at_most() -> None:
    vm = FakeVm("late", 4242, 1)

    async def act(scene: Scene) -> None:
        for _ in range(200):
            scene.monitor.take_call(NotifyCall(1, 4242, vm.vcpus[0].tid, 0))
            await asyncio.sleep(0.25)
        out_of_turn = [after - before < 10 for before, after in itertools.pairwise(scene.host.polls)]
        assert sum(out_of_turn) == 2
        assert scene.monitor.report().lost_records == pytest.approx(200, abs=3)
        scene.host.vms.append(vm)
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, STRANGER_SECONDS + 2)

    play(act, FakeVm("web", 100, 1), trigger=True)
