"""The stall monitor where KVM itself tells where notify exits are: the same verdicts, and nothing is traced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from exporter.monitor.tracked_vcpu import INTERRUPTIONS
from exporter.stalls.verdicts import Evidence, State
from kvm.errors import SourceUnavailable
from tests.exporter.monitor.scene import Scene, play, read_lines
from tests.fake_host import FakeHost, FakeVm, R

GOES_ON = {State.QUIET, State.NOTIFYING, State.PROGRESSING}


def patch(host: FakeHost) -> None:
    host.is_patched = True


@pytest.mark.parametrize("trigger", [True, False])
def test_a_stall_is_found_and_nothing_is_traced(trigger: bool, caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("a", 100, 2)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        took = await scene.wait_for(vm, State.STALLED)
        assert 1.0 < took < (1.5 if trigger else 2.6)
        found = scene.find(vm)
        assert found
        assert (found.verdict.rip, found.verdict.evidence, found.can_judge) == (R, Evidence.KERNEL, True)
        assert found.verdict.registers_alike
        assert found.deferred_reason == ""
        assert found.same_rip_exits > 90
        report = scene.monitor.report()
        assert (report.evidence, report.problem, report.armings, report.records) == (Evidence.KERNEL, "", 0, 0)
        scene.host.set(vm.vcpus[0], "working")
        await scene.wait_for(vm, State.RECOVERED, 3.0)

    host = play(act, vm, trigger=trigger, prepare=patch)
    assert host.armed_times == []
    line = next(line for line in read_lines(caplog) if line["msg"] == "vCPU makes no forward progress")
    assert (line["evidence"], line["registers"]) == ("kernel", "unchanged")


@pytest.mark.parametrize("behaviour", ["alternating", "rep", "running"])
def test_who_makes_progress_is_never_stalled_and_not_traced(behaviour: str) -> None:
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], behaviour)
        states = set()
        for _ in range(300):
            await asyncio.sleep(0.1)
            states.add(scene.state(vm))
        assert states <= GOES_ON | {State.SUSPECT}
        assert states & {State.PROGRESSING, State.QUIET}

    host = play(act, vm, trigger=True, prepare=patch)
    assert host.armed_times == []


def test_an_enclave_is_unknown_and_not_traced() -> None:
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "enclave")
        await scene.wait_for(vm, State.UNKNOWN)
        found = scene.find(vm)
        assert found
        assert not found.can_judge
        await asyncio.sleep(20)
        assert scene.state(vm) is State.UNKNOWN

    assert play(act, vm, trigger=True, prepare=patch).armed_times == []


def bare(host: FakeHost) -> None:
    """KVM tells, and nothing reads registers: stats fds without BPF."""
    host.is_patched, host.has_registers = True, False


@pytest.mark.parametrize(
    ("behaviour", "expected"), [("stuck, uninterrupted", State.STALLED), ("rep", State.PROGRESSING)]
)
def test_without_registers_kvms_own_comparison_tells_a_stall_from_a_rep(
    behaviour: str, expected: State, caplog: pytest.LogCaptureFixture
) -> None:
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], behaviour)
        assert await scene.wait_for(vm, expected) < 1.5
        await asyncio.sleep(20)
        assert scene.state(vm) is expected
        assert scene.monitor.report().problem == ""

    assert play(act, vm, trigger=True, prepare=bare).armed_times == []
    stalls = [line for line in read_lines(caplog) if line["msg"] == "vCPU makes no forward progress"]
    assert [line["registers"] for line in stalls] == ["unchanged"] * (expected is State.STALLED)


def test_without_registers_a_trace_tells_that_a_guest_goes_on_without_notify_exits() -> None:
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck, uninterrupted")
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(30)
        assert scene.host.armed_times == []
        scene.host.set(vm.vcpus[0], "working")
        await scene.wait_for(vm, State.RECOVERED, 5.0)

    assert len(play(act, vm, trigger=True, prepare=bare).armed_times) == 1


def open_told_and_other() -> tuple[FakeVm, FakeVm, Callable[[FakeHost], None]]:
    """Of two VMMs one holds stats fds and one does not: what is known of one VM is not known of all."""
    told, other = FakeVm("a", 100, 1), FakeVm("b", 200, 1)
    told.source, other.source = "stats_fd", "debugfs"

    def prepare(host: FakeHost) -> None:
        bare(host)
        host.unread_vms.add(other.key)
        host.rip_sources = ("stats_fd",)

    return told, other, prepare


def refuse_traces(host: FakeHost) -> None:
    host.refusal = SourceUnavailable("lockdown forbids it", "use integrity")


def test_a_vm_that_another_source_counts_is_traced_beside_those_that_kvm_tells_of() -> None:
    told, other, prepare = open_told_and_other()

    async def act(scene: Scene) -> None:
        for vm in (told, other):
            scene.host.set(vm.vcpus[0], "stuck, uninterrupted")
        await scene.wait_for(told, State.STALLED)
        await scene.wait_for(other, State.STALLED)
        found = [scene.find(vm) for vm in (told, other)]
        assert [report and report.verdict.evidence for report in found] == [Evidence.KERNEL, Evidence.TRACE]

    host = play(act, told, other, prepare=prepare)
    assert {tid for tid, _, _ in host.armed_times} == {other.vcpus[0].tid}


def test_what_may_be_a_td_is_not_traced_where_nothing_says_that_it_is_none() -> None:
    vm = FakeVm("a", 100, 1)
    vm.vcpus[0].untraceable = None

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "others")
        await scene.wait_for(vm, State.UNKNOWN, 20.0)
        found = scene.find(vm)
        assert found
        assert "may be a TD" in found.verdict.reason

    assert play(act, vm, trigger=True, prepare=bare, may_run_tds=True).armed_times == []


@pytest.mark.parametrize(
    ("behaviour", "expected"), [("stuck, with a timer", State.STALLED), ("others", State.PROGRESSING)]
)
def test_what_kvm_cannot_tell_is_traced(behaviour: str, expected: State) -> None:
    """Exits that are no interrupts come between repeats: of a timer of the guest's, or of a guest that goes on."""
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        assert scene.host.armed_times == []
        scene.host.set(vm.vcpus[0], behaviour)
        await asyncio.sleep(0.1 * INTERRUPTIONS / 2)
        assert scene.monitor.report().armings == 0
        await scene.wait_for(vm, expected, 20.0)
        found = scene.find(vm)
        assert found
        assert found.verdict.evidence is Evidence.TRACE

    assert play(act, vm, trigger=True, prepare=patch).armed_times


def test_who_is_told_by_kvm_is_not_traced_because_another_vcpu_has_to_be() -> None:
    other, stuck = FakeVm("a", 100, 1), FakeVm("b", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(other.vcpus[0], "others")
        await scene.wait_for(other, State.PROGRESSING, 20.0)
        scene.host.set(stuck.vcpus[0], "stuck")
        await scene.wait_for(stuck, State.STALLED)
        await asyncio.sleep(15)

    host = play(act, other, stuck, trigger=True, prepare=patch)
    assert {tid for tid, _, _ in host.armed_times} == {other.vcpus[0].tid}


def test_whose_rip_it_is_is_kvms_word_and_not_who_ran_last() -> None:
    vm = FakeVm("a", 100, 1)
    vm.vcpus[0].statistics.last_guest_mode = True  # the reading says that the vCPU's own guest runs

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(2)
        found = scene.find(vm)
        assert found
        assert found.verdict.nested

    play(act, vm, trigger=True, prepare=patch)


def test_slow_exits_are_judged_too() -> None:
    """No trace session lasts as long as these take; KVM sees each of them."""
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=8.0)
        took = await scene.wait_for(vm, State.STALLED, 200.0)
        assert took < 120.0

    assert play(act, vm, trigger=True, prepare=patch).armed_times == []


def test_where_vcpus_cannot_be_read_any_more_exits_are_traced() -> None:
    vm = FakeVm("a", 100, 1)

    async def act(scene: Scene) -> None:
        host = scene.host
        assert scene.monitor.report().evidence is Evidence.KERNEL
        host.is_patched = False  # KVM was loaded anew
        await asyncio.sleep(1.5)
        assert scene.monitor.report().evidence is Evidence.TRACE
        host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, 5.0)
        found = scene.find(vm)
        assert found
        assert found.verdict.evidence is Evidence.TRACE

    assert play(act, vm, prepare=patch).armed_times


def test_a_tracer_that_is_refused_is_no_problem_where_nothing_is_traced() -> None:
    vm = FakeVm("a", 100, 1)

    def prepare(host: FakeHost) -> None:
        patch(host)
        refuse_traces(host)

    async def act(scene: Scene) -> None:
        assert scene.monitor.report().problem == ""
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED, 5.0)

    play(act, vm, prepare=prepare)


def test_where_nothing_can_be_traced_only_those_are_judged_that_kvm_tells_of() -> None:
    told, other, prepare_both = open_told_and_other()

    def prepare(host: FakeHost) -> None:
        prepare_both(host)
        refuse_traces(host)

    async def act(scene: Scene) -> None:
        for vm in (told, other):
            scene.host.set(vm.vcpus[0], "stuck, uninterrupted")
        await scene.wait_for(told, State.STALLED)
        await scene.wait_for(other, State.NOTIFYING)
        figures = scene.monitor.report(with_verdicts=False).figures
        found = [(figures[vm.key].can_judge, figures[vm.key].stuck) for vm in (told, other)]
        assert found == [((True,), (1,)), ((False,), (None,))]

    play(act, told, other, prepare=prepare)


def test_where_nothing_can_be_traced_a_vcpu_that_has_to_be_costs_no_other_of_its_vm() -> None:
    vm = FakeVm("a", 100, 2)

    def prepare(host: FakeHost) -> None:
        patch(host)
        refuse_traces(host)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "others")
        scene.host.set(vm.vcpus[1], "stuck")
        await scene.wait_for(vm, State.STALLED, vcpu=1)
        await asyncio.sleep(5)
        found = scene.monitor.report(with_verdicts=False).figures[vm.key]
        assert (found.can_judge, found.stuck) == ((False, True), (None, 1))

    play(act, vm, trigger=True, prepare=prepare)


def test_many_vcpus_are_all_judged_at_a_bounded_cost() -> None:
    vms = [FakeVm(f"vm{number}", 1000 + 100 * number, 8) for number in range(25)]

    async def act(scene: Scene) -> None:
        for vm in vms:
            for vcpu in vm.vcpus:
                scene.host.set(vcpu, "stuck", interval=0.05)
        began = scene.host.clock()
        await asyncio.sleep(8.0)
        assert all(scene.state(vm, number) is State.STALLED for vm in vms for number in range(8))
        reads = [at for at, _, _ in scene.host.reads if at >= began]
        assert len(reads) <= 8 * 2 * 320 + 400

    assert play(act, *vms, trigger=True, prepare=patch).armed_times == []
