"""The trigger: what it reports, what it counts, and what happens where it cannot be attached."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from exporter.monitor.trigger import GATHER_SECONDS
from exporter.stalls.verdicts import State
from kvm.bpf.notify_trigger import NotifyCall, TriggerStatus, VcpuThread
from kvm.errors import SourceUnavailable
from kvm.model import Protection, VcpuKey
from tests.exporter.monitor.scene import Scene, play
from tests.fake_host import FakeHost, FakeTrigger, FakeVm
from tests.snapshots import INTEL


def test_where_the_trigger_cannot_be_had_counters_are_polled(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    def refuse(trigger: FakeTrigger) -> None:
        trigger.refusal = SourceUnavailable("no libbpf.so.1", "install libbpf1")

    async def act(scene: Scene) -> None:
        assert scene.monitor.report().trigger == "poll"
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)

    play(act, vm, trigger=True, make_trigger=refuse)
    assert any(record.getMessage() == "notify exits are found by polling" for record in caplog.records)


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
def test_a_counter_that_moves_while_the_trigger_is_silent_is_movement(
    registers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a TD on Linux 7.3, whose exits do not go through handle_notify()."""
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)
    vm.vcpus[0].untold = True

    async def act(scene: Scene) -> None:
        await asyncio.sleep(60)
        scene.host.set(other.vcpus[0], "stuck")
        await scene.wait_for(other, State.STALLED)
        scene.host.set(vm.vcpus[0], "stuck")
        assert await scene.wait_for(vm, State.STALLED, 20) < 14
        await asyncio.sleep(1)
        report = scene.monitor.report()
        assert (report.trigger, report.poll_period_seconds, report.trigger_missed > 0) == ("bpf", 1.0, True)
        assert report.missed_vcpus == {VcpuKey(vm.key, 0)}
        scene.host.vms.remove(vm)
        await asyncio.sleep(12)
        assert scene.monitor.report().missed_vcpus == frozenset()

    play(act, vm, other, trigger=True, registers=registers)
    told = [record for record in caplog.records if "the trigger told nothing" in record.getMessage()]
    assert {record.__dict__["fields"]["vm"] for record in told} == {"id-web"}
    assert 1 <= len(told) <= 5


@pytest.mark.parametrize("interval", [0.0002, 0.01, 0.3, 1.0, 4.5, 13.0])
def test_a_trigger_that_tells_misses_nothing_however_fast_and_slow_exits_come(interval: float) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        await asyncio.sleep(60)
        for _ in range(3):
            scene.host.set(vm.vcpus[0], "stuck", interval=interval)
            await asyncio.sleep(17.3 if interval < 0.01 else 47.3)
            scene.host.set(vm.vcpus[0], "running", interval=1.0)
            await asyncio.sleep(80)
        assert scene.monitor.report().trigger_missed == 0

    play(act, vm, trigger=True)


def test_what_the_trigger_lost_and_a_counter_that_was_set_to_0_are_not_missed() -> None:
    vm = FakeVm("web", 100, 1)
    vm.vcpus[0].untold = True
    vm.vcpus[0].notify_exits = 1000

    async def act(scene: Scene) -> None:
        await asyncio.sleep(60)
        vm.vcpus[0].notify_exits = 0
        await asyncio.sleep(30)
        assert scene.monitor.report().trigger_missed == 0
        trigger = scene.host.trigger
        assert trigger is not None
        scene.host.set(vm.vcpus[0], "alternating")
        lost_until = scene.host.clock() + 10
        while scene.host.clock() < lost_until:
            trigger.lost = (trigger.lost[0] + 1, 0)
            await asyncio.sleep(0.1)
        assert scene.monitor.report().trigger_missed == 0

    play(act, vm, trigger=True)


def test_what_comes_close_together_is_taken_together() -> None:
    vm = FakeVm("web", 100, 50)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        await asyncio.sleep(60)
        scene.host.settle()
        taken: list[int] = []
        deliver = trigger.deliver

        def count() -> int:
            taken.append(deliver())
            return taken[-1]

        trigger.deliver = count  # type: ignore[method-assign]
        trigger.tell(vm.vcpus[0], scene.host.clock())
        await asyncio.sleep(0.001)
        assert taken == [1], "the first one at once"
        for vcpu in vm.vcpus[1:]:
            trigger.tell(vcpu, scene.host.clock())
            await asyncio.sleep(0.001)
        await asyncio.sleep(GATHER_SECONDS)
        assert sum(taken) == 50
        assert len(taken) <= 5

    play(act, vm, trigger=True)


def test_where_no_notify_exit_can_happen_there_is_no_trigger_and_no_poll() -> None:
    def refuse(trigger: FakeTrigger) -> None:
        trigger.status = TriggerStatus("handle_notify", False, "no module has it")

    def prepare(host: FakeHost) -> None:
        host.host = replace(INTEL, notify_supported=False)
        host.vms[0].protection = Protection.UNSUPPORTED

    async def act(scene: Scene) -> None:
        await asyncio.sleep(10)
        assert (scene.monitor.report().trigger, scene.monitor.report().poll_period_seconds) == ("", 0.0)

    play(act, FakeVm("web", 100, 1), trigger=True, make_trigger=refuse, prepare=prepare)


def test_exits_with_an_invalid_context_are_told_by_the_trigger() -> None:
    async def act(scene: Scene) -> None:
        assert scene.host.trigger is not None
        scene.host.trigger.invalid = {VcpuThread(100, 77, 110, 0): 3}
        assert scene.monitor.report().context_invalid == {(100, 77, 110, 0): 3}

    play(act, FakeVm("web", 100, 1), trigger=True)


def test_one_exit_with_an_invalid_context_is_reported_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """One is the normal case: the VMM stops the VM at it, so there is no second exit and no trace."""
    vm = FakeVm("web", 100, 2)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        scene.host.set(vm.vcpus[1], "running", interval=1.0)
        await asyncio.sleep(100)
        scene.host.settle()
        vm.vcpus[1].notify_exits += 1
        trigger.invalid = {VcpuThread(*vm.key[:2], vm.vcpus[1].tid, 2): 1}
        trigger.tell(vm.vcpus[1], scene.host.clock())
        scene.host.set(vm.vcpus[1], "idle")
        assert await scene.wait_for(vm, State.CONTEXT_LOST, vcpu=1) < 0.1
        await asyncio.sleep(600)
        found = scene.find(vm, 1)
        assert found is not None
        assert (found.verdict.state, found.can_judge) == (State.CONTEXT_LOST, True)
        assert found.verdict.reason == "the CPU has lost its state (context invalid)"
        scene.host.set(vm.vcpus[1], "running", interval=0.1)  # somebody has reset the VM
        await scene.wait_for(vm, State.NOTIFYING, vcpu=1)
        await scene.wait_for(vm, State.QUIET, 120, vcpu=1)

    play(act, vm, trigger=True)
    (line,) = [r for r in caplog.records if r.getMessage() == "the CPU has lost the state of a vCPU"]
    assert line.levelno == logging.WARNING
    fields = line.fields  # type: ignore[attr-defined]
    assert (fields["name"], fields["vcpu"], fields["tid"], fields["context"]) == ("web", 1, vm.vcpus[1].tid, "invalid")


def test_a_lost_context_of_a_thread_that_nobody_knows_is_reported_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def act(scene: Scene) -> None:
        assert scene.host.trigger is not None
        scene.host.trigger.invalid = {VcpuThread(4242, 77, 4250, 3): 1}
        scene.monitor.take_call(NotifyCall(1, 4242, 4250, 3))
        await asyncio.sleep(30)

    play(act, FakeVm("web", 100, 1), trigger=True)
    told = [r.fields for r in caplog.records if "whose VM is not known" in r.getMessage()]  # type: ignore[attr-defined]
    assert told == [{"pid": 4242, "tid": 4250, "vcpu_id": 3}]


def test_counts_that_cannot_be_read_for_a_moment_are_no_news_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        lost = {VcpuThread(*vm.key[:2], vm.vcpus[0].tid, 0): 1}
        trigger.invalid = lost
        trigger.tell(vm.vcpus[0], scene.host.clock())
        await scene.wait_for(vm, State.CONTEXT_LOST)
        scene.host.set(vm.vcpus[0], "running", interval=0.1)
        await scene.wait_for(vm, State.NOTIFYING, 30)
        for _ in range(10):
            trigger.unreadable = True
            await asyncio.sleep(3)
            trigger.unreadable = False
            await asyncio.sleep(3)
        assert scene.monitor.report().context_invalid == {(*vm.key[:2], vm.vcpus[0].tid, 0): 1}

    play(act, vm, trigger=True)
    texts = [record.getMessage() for record in caplog.records]
    assert texts.count("the CPU has lost the state of a vCPU") == 1
    assert 1 <= texts.count("exits with an invalid context cannot be read") <= 5


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
        assert scene.monitor.report().context_invalid == {(*other.key[:2], 210, 0): 4}

    play(act, vm, other, trigger=True)


def test_what_the_trigger_drops_is_counted() -> None:
    async def act(scene: Scene) -> None:
        assert scene.host.trigger is not None
        scene.host.trigger.lost = (2, 3)
        assert scene.monitor.report().lost_records == 5

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
        assert scene.monitor.report().context_invalid == {theirs: 4}
        scene.host.vms.append(vm)

    play(act, vm, other, trigger=True)


def test_why_no_trigger_is_attached_is_told_and_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(trigger: FakeTrigger) -> None:
        trigger.refusal = SourceUnavailable("no libbpf.so.1", "install libbpf1")

    async def act(scene: Scene) -> None:
        trigger = scene.host.trigger
        assert trigger is not None
        assert scene.monitor.report().trigger_problem == "no libbpf.so.1; install libbpf1"
        await asyncio.sleep(610)
        trigger.refusal, trigger.status = None, TriggerStatus("handle_notify", False, "no module has it")
        await asyncio.sleep(610)
        assert scene.monitor.report().trigger_problem == "no module has it"
        trigger.status = TriggerStatus("handle_notify", True)
        await asyncio.sleep(310)
        assert (scene.monitor.report().trigger, scene.monitor.report().trigger_problem) == ("bpf", "")

    play(act, FakeVm("web", 100, 1), trigger=True, make_trigger=refuse)
    told = [record.fields["reason"] for record in caplog.records if "notify exits" in record.getMessage()]  # type: ignore[attr-defined]
    assert told == ["no libbpf.so.1", "no module has it", ""]


def test_where_kvm_comes_what_needs_it_is_tried_anew_within_five_seconds() -> None:
    no_kvm = SourceUnavailable("KVM is not loaded", "load it")

    def refuse(trigger: FakeTrigger) -> None:
        trigger.refusal = no_kvm

    def unload(host: FakeHost) -> None:
        host.host, host.refusal = replace(INTEL, kvm_module="", notify_supported=None), no_kvm

    async def act(scene: Scene) -> None:
        host = scene.host
        await asyncio.sleep(100)
        assert (scene.monitor.report().trigger, scene.monitor.report().problem) == ("", str(no_kvm))
        assert host.trigger is not None
        host.host, host.refusal, host.trigger.refusal = INTEL, None, None
        host.kvm_changes += 1
        await asyncio.sleep(5)
        assert (scene.monitor.report().trigger, scene.monitor.report().problem) == ("bpf", "")

    play(act, trigger=True, prepare=unload, make_trigger=refuse)


def test_a_trigger_that_is_switched_off_is_no_problem() -> None:
    async def act(scene: Scene) -> None:
        assert (scene.monitor.report().trigger, scene.monitor.report().trigger_problem) == ("poll", "")

    play(act, FakeVm("web", 100, 1))


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
@pytest.mark.parametrize("interval", [0.01, 0.9, 1.24, 1.6])
def test_a_stall_of_which_the_trigger_alone_tells_goes_on(interval: float, registers: bool) -> None:
    """It tells each five seconds: not much is to be heard of a vCPU whose counter cannot be read any more."""
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=interval)
        await scene.wait_for(vm, State.STALLED, 300)
        lose_sight(scene, vm)
        until = scene.host.clock() + 100
        while scene.host.clock() < until:
            assert scene.state(vm) is State.STALLED
            await asyncio.sleep(0.05)

    play(act, vm, trigger=True, registers=registers)


def test_of_a_vcpu_that_cannot_be_read_recovery_is_seen_and_the_next_stall_is_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "running", interval=0.1)
        await asyncio.sleep(20)
        lose_sight(scene, vm)
        await asyncio.sleep(20)
        scene.host.set(vm.vcpus[0], "stuck", interval=0.01)
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(2)
        scene.host.set(vm.vcpus[0], "running", interval=0.1)
        await scene.wait_for(vm, State.RECOVERED, 20)
        await asyncio.sleep(100)
        stuck = scene.host.clock()
        scene.host.set(vm.vcpus[0], "stuck", interval=0.01)
        await scene.wait_for(vm, State.STALLED)
        found = scene.find(vm)
        assert found is not None
        assert found.verdict.stuck_since_seconds is not None
        assert found.verdict.stuck_since_seconds >= stuck

    play(act, vm, trigger=True, registers=False)
    assert [record.getMessage() for record in caplog.records if "again" in record.getMessage()]


def lose_sight(scene: Scene, vm: FakeVm) -> None:
    """No counter can be read any more."""
    scene.host.failure = "no memory"
    scene.host.unread_vms.add(vm.key)


@pytest.mark.parametrize("gap", [0.2, 2.0, 4.0])
def test_a_thread_with_the_number_of_one_that_was_told_of_is_not_missed(gap: float) -> None:
    vm, other, busy = FakeVm("web", 100, 1), FakeVm("db", 200, 1), FakeVm("x", 300, 1)
    other.vcpus[0].tid = vm.vcpus[0].tid

    async def act(scene: Scene) -> None:
        await asyncio.sleep(30)
        scene.host.set(busy.vcpus[0], "alternating", interval=0.1)
        await asyncio.sleep(10.3)
        scene.host.set(vm.vcpus[0], "alternating", interval=0.01)
        await asyncio.sleep(0.3)
        scene.host.end(vm)
        await asyncio.sleep(gap)
        scene.host.vms.append(other)
        scene.host.set(other.vcpus[0], "alternating", interval=0.01)
        await asyncio.sleep(30)
        assert scene.monitor.report().trigger_missed == 0

    play(act, vm, busy, trigger=True, registers=False)


def test_vcpus_that_one_thread_runs_by_turns_are_not_missed() -> None:
    vm = FakeVm("web", 100, 3)
    for vcpu in vm.vcpus:
        vcpu.tid = vm.vcpus[0].tid

    async def act(scene: Scene) -> None:
        await asyncio.sleep(30)
        for _ in range(20):
            for vcpu in vm.vcpus:
                scene.host.set(vcpu, "alternating", interval=0.01)
                await asyncio.sleep(0.7)
                scene.host.set(vcpu, "idle")
        await asyncio.sleep(30)
        assert scene.monitor.report().trigger_missed == 0

    play(act, vm, trigger=True)
