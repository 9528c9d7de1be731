"""The watch on simulated hosts, in virtual time: what is found, how soon, and what it costs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from exporter.monitor.backends import Backends, PollMode
from exporter.monitor.stall_monitor import StallMonitor
from exporter.monitor.thread_index import STRANGER_SECONDS, UNPLACED_CALLS
from exporter.monitor.tracked_vcpu import OTHERS_FIRST
from exporter.stalls.drill import NoDrill
from exporter.stalls.verdicts import StallRule, State, VcpuReport
from kvm.bpf.notify_trigger import NotifyCall, TriggerStatus, VcpuThread
from kvm.errors import SourceUnavailable
from kvm.model import Protection
from tests.fake_host import FakeHost, FakeTrigger, FakeVm, R
from tests.snapshots import INTEL
from tests.virtual_time import run_inline, run_virtual


@dataclass
class Scene:
    """A running watch on a simulated host."""

    host: FakeHost
    watch: StallMonitor

    def state(self, vm: FakeVm, vcpu: int = 0) -> State:
        """What the watch says of a vCPU; one that it has not heard of is quiet."""
        found = self.find(vm, vcpu)
        return found.verdict.state if found else State.QUIET

    def find(self, vm: FakeVm, vcpu: int = 0) -> VcpuReport | None:
        reports = [r for r in self.watch.report().vcpus if r.vm.key == vm.key and r.vcpu.index == vcpu]
        return reports[-1] if reports else None

    async def wait_for(self, vm: FakeVm, state: State, seconds: float = 10.0) -> float:
        """Wait for a state; returns how long it took."""
        began = self.host.clock()
        while self.state(vm) is not state:
            assert self.host.clock() < began + seconds, (self.state(vm), self.find(vm))
            await asyncio.sleep(0.005)
            self.host.settle()
        return self.host.clock() - began


def play(
    act: Callable[[Scene], Awaitable[None]],
    *vms: FakeVm,
    trigger: bool = False,
    registers: bool = True,
    cpu_time: bool = True,
    poll: PollMode = PollMode.AUTO,
    prepare: Callable[[FakeHost], None] = lambda host: None,
    make_trigger: Callable[[FakeTrigger], None] = lambda trigger: None,
    rule: StallRule | None = None,
) -> FakeHost:
    """Run a watch in virtual time while something happens; nothing may be left behind."""

    async def main() -> FakeHost:
        loop = asyncio.get_running_loop()
        host = FakeHost(loop.time, *vms)
        prepare(host)

        def open_trigger(on_call: Callable[..., None]) -> FakeTrigger:
            made = host.make_trigger(on_call)
            make_trigger(made)
            return made

        backends = Backends(
            reader=host,
            tracer=host,
            read_vcpu=host.read_vcpu if registers else None,
            open_pidfd=host.hold,
            is_thread=host.is_thread,
            read_cpu_time=host.read_cpu_time if cpu_time else None,
            make_trigger=open_trigger if trigger else None,
        )
        watch = StallMonitor(
            backends, rule=rule or StallRule(), poll=poll, unix=lambda: 1.8e9 + loop.time(), run=run_inline
        )
        stop = asyncio.Event()
        running = asyncio.create_task(watch.run(stop))
        living = asyncio.create_task(host.live())
        await asyncio.sleep(0.5)
        try:
            await act(Scene(host, watch))
        finally:
            living.cancel()
            stop.set()
            await asyncio.wait_for(running, 60)
        return host

    fds = set(os.listdir("/proc/self/fd"))
    host = run_virtual(main())
    for _, write in host.pidfds.values():
        os.close(write)
    assert set(os.listdir("/proc/self/fd")) == fds
    assert not any(vcpu.armed for vcpu in host.vcpus())
    assert (host.closed, host.warm) == (True, False)
    return host


def read_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [
        {"msg": record.getMessage(), **record.fields}  # type: ignore[attr-defined]
        for record in caplog.records
        if "vCPU" in record.getMessage() and "name" in getattr(record, "fields", {})
    ]


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_stall_is_found_told_of_and_its_end_too(trigger: bool, caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 2), FakeVm("db", 200, 2)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        suspect_after = await scene.wait_for(vm, State.SUSPECT)
        stalled_after = await scene.wait_for(vm, State.STALLED)
        assert suspect_after < (0.1 if trigger else 1.2)
        assert 0.99 <= stalled_after < 1.1
        await asyncio.sleep(20)
        assert scene.state(vm) is State.STALLED
        found = scene.find(vm)
        assert found is not None
        assert found.verdict.rip == R
        scene.host.set(vm.vcpus[0], "running")
        assert await scene.wait_for(vm, State.RECOVERED, 15) < 15
        assert scene.state(other) is State.QUIET

    play(act, vm, other, trigger=trigger)
    stall, end = read_lines(caplog)
    assert (stall["msg"], stall["name"], stall["vcpu"], stall["tid"]) == (
        "vCPU makes no forward progress",
        "web",
        0,
        110,
    )
    assert (stall["rip"], stall["registers"], stall["nested"]) == (hex(R), "unchanged", "no")
    assert end["msg"] == "vCPU makes progress again"


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
@pytest.mark.parametrize("behaviour", ["alternating", "others", "rep", "hidden"])
def test_a_guest_that_makes_progress_is_never_stalled(behaviour: str, registers: bool, trigger: bool) -> None:
    if behaviour == "rep" and not registers:
        return  # cannot be told apart, and the log line says so
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], behaviour)
        for _ in range(600):
            await asyncio.sleep(0.1)
            assert scene.state(vm) is not State.STALLED
        assert scene.watch.report().warnings == 0
        found = scene.find(vm)
        assert found is not None
        assert found.traced_exits > 0
        assert found.can_judge == (behaviour != "hidden")

    play(act, vm, trigger=trigger, registers=registers)


def test_without_registers_a_stall_is_found_by_polling_alone(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        assert await scene.wait_for(vm, State.STALLED) < 5
        scene.host.set(vm.vcpus[0], "running")
        assert await scene.wait_for(vm, State.RECOVERED, 15) < 15

    play(act, vm, registers=False)
    stall, _ = read_lines(caplog)
    assert stall["registers"] == "not-read"


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_stuck_guest_that_is_paused_is_unknown_and_stalled_again_without_a_second_line(
    trigger: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        scene.host.set(vm.vcpus[0], "idle")
        assert await scene.wait_for(vm, State.UNKNOWN) < 5
        await asyncio.sleep(60)
        armings = scene.watch.report().armings
        await asyncio.sleep(1000)
        assert (scene.state(vm), scene.watch.report().armings) == (State.UNKNOWN, armings)
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, 15)

    play(act, vm, trigger=trigger)
    assert len(read_lines(caplog)) == 1


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
@pytest.mark.parametrize("cpu_time", [False, True], ids=["without-cpu-time", "with-cpu-time"])
def test_the_cpu_time_of_its_thread_tells_that_a_stuck_guest_was_paused(cpu_time: bool, registers: bool) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(1.5)
        stalled = scene.find(vm)
        scene.host.set(vm.vcpus[0], "idle")
        paused_after = await scene.wait_for(vm, State.UNKNOWN)
        paused = scene.find(vm)
        assert stalled and paused
        if cpu_time:
            assert stalled.verdict.cpu_percent == pytest.approx(100, abs=3)
            assert "paused or throttled" in paused.verdict.reason
            assert paused_after < 3.0
        else:
            assert (stalled.verdict.cpu_percent, paused.verdict.cpu_percent) == (None, None)
            assert paused.verdict.reason == "its counter stands still: it may be paused"

    play(act, vm, cpu_time=cpu_time, registers=registers)


def test_a_slow_stall_is_found_within_its_budget() -> None:
    """One exit every two seconds: ten that were watched take several looks."""
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=1.0)
        assert await scene.wait_for(vm, State.STALLED, 300) < 200

    host = play(act, vm)
    check_share(host)


def check_share(host: FakeHost, share: float = 0.1, window: float = 60.0) -> None:
    """No thread was armed for more than its share of any minute after its first look."""
    for tid in {tid for tid, _, _ in host.armed_times}:
        looks = sorted((began, ended) for found, began, ended in host.armed_times if found == tid)[1:]
        for start in [ended - window for _, ended in looks]:
            used = sum(max(0.0, min(ended, start + window) - max(began, start)) for began, ended in looks)
            assert used <= share * window + 0.3, (tid, used)


def test_a_vcpu_that_goes_on_is_looked_at_though_it_has_had_its_share_of_looks() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.SUSPECT)
        await asyncio.sleep(30)
        assert scene.watch.report().budget_exhausted > 0
        scene.host.set(vm.vcpus[0], "running")
        assert await scene.wait_for(vm, State.PROGRESSING, 15) < 3

    play(act, vm, registers=False, rule=StallRule(seconds=1000.0))


def test_while_nothing_happens_nothing_is_armed_and_nobody_polls() -> None:
    vm = FakeVm("web", 100, 4)

    async def act(scene: Scene) -> None:
        polls = len(scene.host.polls)
        await asyncio.sleep(3600)
        report = scene.watch.report()
        assert (report.trigger, report.poll_period_seconds, report.armings) == ("bpf", 0.0, 0)
        assert len(scene.host.polls) == polls
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
        assert scene.watch.report().poll_period_seconds == period
        assert len(scene.host.polls) - before == pytest.approx(polls, abs=2)

    play(act, vm, poll=poll, prepare=prepare)


def test_the_tracepoint_stays_for_a_minute_after_the_last_look() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "alternating")
        await asyncio.sleep(3)
        scene.host.set(vm.vcpus[0], "idle")
        assert scene.host.warm
        await asyncio.sleep(40)
        assert scene.host.warm
        await asyncio.sleep(90)
        assert not scene.host.warm

    play(act, vm, trigger=True)


@pytest.mark.parametrize("behaviour", ["alternating", "stuck", "rep"])
def test_a_flood_of_64_vcpus_hides_nobodys_stall_and_stays_in_its_budget(behaviour: str) -> None:
    flood, victim = FakeVm("flood", 1000, 64), FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        for vcpu in flood.vcpus:
            scene.host.set(vcpu, behaviour, interval=0.05)
        await asyncio.sleep(10)
        scene.host.set(victim.vcpus[0], "stuck")
        assert await scene.wait_for(victim, State.STALLED) < 5
        await asyncio.sleep(60)
        report = scene.watch.report()
        assert report.budget_exhausted > 0
        assert report.warnings <= 2 + 6

    host = play(act, flood, victim, trigger=True)
    assert host.most_armed <= 4 + 1
    check_share(host)


def test_no_more_than_16_threads_are_armed_at_once() -> None:
    vms = [FakeVm(f"vm{number}", 1000 * (number + 1), 4) for number in range(10)]

    async def act(scene: Scene) -> None:
        for vm in vms:
            for vcpu in vm.vcpus:
                scene.host.set(vcpu, "stuck", interval=0.05)
        await asyncio.sleep(60)
        assert all(scene.state(vm, vcpu) is State.STALLED for vm in vms for vcpu in range(4))
        assert scene.watch.report().warnings <= 10

    assert play(act, *vms).most_armed == 16


def test_a_guest_that_stops_just_before_each_look_is_not_stalled_and_not_looked_at_all_the_time() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        for _ in range(120):
            scene.host.set(vm.vcpus[0], "alternating")
            await asyncio.sleep(0.5)
            scene.host.set(vm.vcpus[0], "idle")
            await asyncio.sleep(0.5)
        assert scene.state(vm) is not State.STALLED

    check_share(play(act, vm))


def test_lost_records_are_counted_and_prove_nothing() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.loses = True
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(30)
        report = scene.watch.report()
        assert report.lost_records > 0
        assert (report.records, report.warnings, scene.state(vm)) == (0, 0, State.NOTIFYING)

    play(act, vm)


def test_a_thread_that_dies_while_armed_ends_the_look(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.SUSPECT)
        scene.host.dead_threads.add(vm.vcpus[0].tid)
        await asyncio.sleep(10)
        report = scene.watch.report()
        assert (report.traced_vcpus, report.problem) == (0, "")

    play(act, vm)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_tid_that_belongs_to_somebody_else_by_now_is_left_alone() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.strangers.add(vm.vcpus[0].tid)
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(10)
        assert scene.watch.report().records == 0
        assert scene.state(vm) is State.NOTIFYING

    play(act, vm)


def test_a_vm_that_ends_while_armed_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        armed = vm.vcpus[0].armed
        scene.host.end(vm)
        await asyncio.sleep(0.1)
        assert scene.watch.report().vcpus == ()
        assert armed == []

    play(act, vm, other)
    assert [line["msg"] for line in read_lines(caplog)][-1] == "vCPU is gone: its VM has ended"


def test_without_a_tracer_it_says_so_and_judges_nobody() -> None:
    vm = FakeVm("web", 100, 1)

    def prepare(host: FakeHost) -> None:
        host.refusal = SourceUnavailable("no CAP_PERFMON", "give it")

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(5)
        report = scene.watch.report()
        assert report.problem == "no CAP_PERFMON; give it"
        assert [(found.verdict.state, found.can_judge) for found in report.vcpus] == [(State.NOTIFYING, False)]
        scene.host.refusal = None
        await asyncio.sleep(310)
        assert scene.state(vm) is State.STALLED

    play(act, vm, prepare=prepare)


def test_a_thread_that_cannot_be_traced_costs_nobody_else_anything(caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.refused_threads.add(vm.vcpus[0].tid)
        for found in (vm, other):
            scene.host.set(found.vcpus[0], "stuck")
        await scene.wait_for(other, State.STALLED)
        await asyncio.sleep(600)
        assert scene.watch.report().problem == ""
        assert scene.state(vm) is State.NOTIFYING

    play(act, vm, other)
    told = [record for record in caplog.records if record.getMessage() == "the exits of a vCPU cannot be traced"]
    assert len(told) == 1


def test_where_the_trigger_cannot_be_had_counters_are_polled(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    def refuse(trigger: FakeTrigger) -> None:
        trigger.refusal = SourceUnavailable("no libbpf.so.1", "install libbpf1")

    async def act(scene: Scene) -> None:
        assert scene.watch.report().trigger == "poll"
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)

    play(act, vm, trigger=True, make_trigger=refuse)
    assert any(record.getMessage() == "notify exits are found by polling" for record in caplog.records)


def test_where_no_notify_exit_can_happen_there_is_no_trigger_and_no_poll() -> None:
    def refuse(trigger: FakeTrigger) -> None:
        trigger.status = TriggerStatus("handle_notify", False, "no module has it")

    def prepare(host: FakeHost) -> None:
        host.host = replace(INTEL, notify_supported=False)
        host.vms[0].protection = Protection.UNSUPPORTED

    async def act(scene: Scene) -> None:
        await asyncio.sleep(10)
        assert (scene.watch.report().trigger, scene.watch.report().poll_period_seconds) == ("", 0.0)

    play(act, FakeVm("web", 100, 1), trigger=True, make_trigger=refuse, prepare=prepare)


def test_a_vm_that_came_after_the_last_look_is_found_by_its_first_call() -> None:
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
        assert scene.watch.report().vcpus == ()
        scene.host.vms.append(vm)

    play(act, vm)


def test_the_shortest_interval_is_known_by_window() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=0.02)
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(1)
        assert scene.watch.report().interval_min_seconds == {128_000: pytest.approx(0.02)}

    play(act, vm)


def test_exits_with_an_invalid_context_are_told_by_the_trigger() -> None:
    async def act(scene: Scene) -> None:
        assert scene.host.trigger is not None
        scene.host.trigger.invalid = {VcpuThread(100, 77, 110, 0): 3}
        assert scene.watch.report().context_invalid == {(100, 77, 110, 0): 3}

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_what_was_counted_for_a_vm_that_has_ended_is_forgotten() -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        trigger.invalid = {VcpuThread(*vm.key[:2], 110, 0): 3, VcpuThread(*other.key[:2], 210, 0): 4}
        trigger.invalid[VcpuThread(*vm.key[:2], 119, 0)] = 1  # a thread that it had before
        scene.host.end(vm)
        await asyncio.sleep(0.1)
        assert scene.watch.report().context_invalid == {(*other.key[:2], 210, 0): 4}

    play(act, vm, other, trigger=True)


def test_what_the_trigger_drops_is_counted() -> None:
    async def act(scene: Scene) -> None:
        assert scene.host.trigger is not None
        scene.host.trigger.lost = (2, 3)
        assert scene.watch.report().lost_records == 5

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_a_drill_goes_through_everything_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 2)

    async def act(scene: Scene) -> None:
        begun = await scene.watch.start_drill("web")
        assert (begun.drill, begun.verdict.state, begun.vcpu.index) == (True, State.STALLED, 0)
        with pytest.raises(NoDrill, match="under way"):
            await scene.watch.start_drill("web")
        await asyncio.sleep(59)
        assert [report.drill for report in scene.watch.report().vcpus] == [True]
        await asyncio.sleep(2)
        assert scene.watch.report().vcpus == ()
        with pytest.raises(NoDrill, match="no VM is called 'nobody'"):
            await scene.watch.start_drill("nobody")

    play(act, vm, trigger=True)
    stall, end = read_lines(caplog)
    assert stall["msg"] == "DRILL, not real: vCPU makes no forward progress"
    assert end["msg"] == "DRILL, not real: vCPU makes progress again"
    assert end["stalled_seconds"] == pytest.approx(61, abs=1)


def test_what_goes_wrong_is_logged_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        vms, scene.host.vms = scene.host.vms, [None]  # type: ignore[list-item]
        await asyncio.sleep(5)
        scene.host.vms = vms
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)

    play(act, vm)
    assert any("goes on" in record.getMessage() for record in caplog.records)


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
        scene.watch.take_call(NotifyCall(1, 4242, 5000, 0))
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
    assert any(record.getMessage() == "watching for stalls works again" for record in caplog.records)


def test_what_does_not_need_the_reader_goes_on_where_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await scene.watch.start_drill("db")
        trigger.invalid = {VcpuThread(*vm.key[:2], 110, 0): 3}
        scene.host.failure = "no memory"
        scene.host.end(vm)
        await asyncio.sleep(0.1)
        assert scene.watch.report().context_invalid == {}
        await asyncio.sleep(62)
        assert scene.watch.report().vcpus == ()
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
        assert max(at_once.values(), default=0) <= 4  # by looks

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


def test_a_stall_is_unknown_where_the_host_cannot_be_looked_at_any_more() -> None:
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
        assert scene.state(vm, 1) is State.UNKNOWN
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
            scene.watch.take_call(NotifyCall(1, 4242, 5000 + number, 0))
        assert scene.watch.report().lost_records == 1000 - UNPLACED_CALLS
        await asyncio.sleep(3)
        assert scene.watch.report().lost_records == 1000

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_a_thread_that_cannot_be_placed_has_the_host_looked_at_twice_a_minute_at_most() -> None:
    vm = FakeVm("late", 4242, 1)

    async def act(scene: Scene) -> None:
        polls = len(scene.host.polls)
        for _ in range(200):
            scene.watch.take_call(NotifyCall(1, 4242, vm.vcpus[0].tid, 0))
            await asyncio.sleep(0.25)
        assert len(scene.host.polls) - polls == 2
        assert scene.watch.report().lost_records == pytest.approx(200, abs=3)
        scene.host.vms.append(vm)
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, STRANGER_SECONDS + 2)

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_a_vm_that_is_gone_costs_the_others_of_its_process_no_counts() -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 100, 1, vm_fd=20)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        for found in (vm, other):
            scene.host.set(found.vcpus[0], "stuck")
            await scene.wait_for(found, State.STALLED)
        ours, theirs = VcpuThread(*vm.key[:2], 110, 0), VcpuThread(*other.key[:2], 121, 0)
        trigger.invalid = {ours: 3, theirs: 4}
        scene.host.vms.remove(vm)
        await asyncio.sleep(90)
        assert scene.watch.report().context_invalid == {theirs: 4}
        scene.host.vms.append(vm)

    play(act, vm, other, trigger=True)


def test_why_no_trigger_is_attached_is_told_and_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(trigger: FakeTrigger) -> None:
        trigger.refusal = SourceUnavailable("no libbpf.so.1", "install libbpf1")

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        assert scene.watch.report().trigger_problem == "no libbpf.so.1; install libbpf1"
        await asyncio.sleep(610)
        trigger.refusal, trigger.status = None, TriggerStatus("handle_notify", False, "no module has it")
        await asyncio.sleep(610)
        assert scene.watch.report().trigger_problem == "no module has it"
        trigger.status = TriggerStatus("handle_notify", True)
        await asyncio.sleep(310)
        assert (scene.watch.report().trigger, scene.watch.report().trigger_problem) == ("bpf", "")

    play(act, FakeVm("web", 100, 1), trigger=True, make_trigger=refuse)
    told = [record.fields["reason"] for record in caplog.records if "notify exits" in record.getMessage()]  # type: ignore[attr-defined]
    assert told == ["no libbpf.so.1", "no module has it", ""]


def test_a_trigger_that_is_switched_off_is_no_problem() -> None:
    async def act(scene: Scene) -> None:
        assert (scene.watch.report().trigger, scene.watch.report().trigger_problem) == ("poll", "")

    play(act, FakeVm("web", 100, 1))


def test_why_a_vcpu_is_not_looked_at_is_told() -> None:
    vm, refused = FakeVm("web", 100, 5), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.refused_threads.add(refused.vcpus[0].tid)
        for vcpu in (*vm.vcpus, *refused.vcpus):
            scene.host.set(vcpu, "stuck", interval=0.1)
        await asyncio.sleep(0.6)
        found = [scene.find(vm, number) for number in range(5)]
        assert sorted(report.deferred_reason for report in found if report) == ["", "", "", "", OTHERS_FIRST]
        told = scene.find(refused)
        assert told is not None
        assert "SELinux forbids it" in told.deferred_reason

    play(act, vm, refused, trigger=True)


def test_the_next_look_begins_as_soon_as_one_has_ended() -> None:
    vm = FakeVm("web", 100, 8)

    async def act(scene: Scene) -> None:
        for vcpu in vm.vcpus:
            scene.host.set(vcpu, "alternating", interval=0.05)
        await asyncio.sleep(10)
        began = sorted(scene.host.armed_times, key=lambda times: times[1])
        fourth, fifth = began[3], began[4]
        assert fifth[1] - min(ended for _, _, ended in began[:4]) < 0.02, (fourth, fifth)

    play(act, vm, trigger=True)


def test_the_tracepoint_is_not_let_go_under_a_look() -> None:
    vm = FakeVm("web", 100, 2)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "alternating")
        await asyncio.sleep(1)
        scene.host.set(vm.vcpus[0], "idle")
        await asyncio.sleep(5)
        ended = max(ended for _, _, ended in scene.host.armed_times)
        await asyncio.sleep(ended + 60 - 1.5 - scene.host.clock())
        scene.host.set(vm.vcpus[1], "stuck", interval=0.9)
        await asyncio.sleep(10)
        looks = [times for times in scene.host.armed_times if times[0] == vm.vcpus[1].tid]
        assert looks[0][1] < ended + 60 < looks[0][2]

    assert not play(act, vm, trigger=True).cooled_while_armed
