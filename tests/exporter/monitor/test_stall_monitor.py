"""The stall monitor on simulated hosts, in virtual time: what is found, and how soon."""

from __future__ import annotations

import asyncio

import pytest

from exporter.stalls.drill import NoDrill
from exporter.stalls.verdicts import State
from tests.exporter.monitor.scene import Scene, play, read_lines
from tests.fake_host import FakeVm, R


@pytest.mark.parametrize("trigger", [False, True], ids=["polled", "triggered"])
def test_a_stall_is_found_and_reported_and_so_is_its_end(trigger: bool, caplog: pytest.LogCaptureFixture) -> None:
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
@pytest.mark.parametrize("behaviour", ["alternating", "others", "rep", "enclave"])
def test_a_guest_that_makes_progress_is_never_stalled(behaviour: str, registers: bool, trigger: bool) -> None:
    if behaviour == "rep" and not registers:
        return  # cannot be told apart, and the log line says so
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], behaviour)
        for _ in range(600):
            await asyncio.sleep(0.1)
            assert scene.state(vm) is not State.STALLED
        assert scene.monitor.report().warnings == 0
        found = scene.find(vm)
        assert found is not None
        assert found.traced_exits > 0
        assert found.can_judge == (behaviour != "enclave")

    play(act, vm, trigger=trigger, registers=registers)


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
def test_a_guest_that_is_stuck_at_rip_0_is_stalled(registers: bool, caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck at 0")
        assert await scene.wait_for(vm, State.STALLED) < 5

    play(act, vm, registers=registers)
    (stall,) = read_lines(caplog)
    assert stall["rip"] == "0x0"


def test_a_vcpu_whose_exits_must_not_be_traced_is_never_armed_and_unknown() -> None:
    td, other = FakeVm("td", 100, 1), FakeVm("web", 200, 1)
    td.vcpus[0].untraceable = "it is a TD"

    async def act(scene: Scene) -> None:
        for vm in (td, other):
            scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(other, State.STALLED)
        await asyncio.sleep(120)
        found = scene.find(td)
        assert found is not None
        assert (found.verdict.state, found.verdict.reason) == (State.UNKNOWN, "it is a TD")
        assert (found.can_judge, found.traced_exits) == (False, 0)
        assert scene.monitor.report().armings == len({began for _, began, _ in scene.host.armed_times}) > 0

    host = play(act, td, other, trigger=True)
    assert {tid for tid, _, _ in host.armed_times} == {other.vcpus[0].tid}


@pytest.mark.parametrize("registers", [False, True], ids=["without-registers", "with-registers"])
def test_where_tds_may_run_a_vcpu_that_cannot_be_read_is_never_armed(registers: bool) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED if registers else State.UNKNOWN)
        found = scene.find(vm)
        assert found is not None
        assert found.can_judge == registers
        assert registers or found.verdict.reason.startswith("it may be a TD")

    host = play(act, vm, registers=registers, may_run_tds=True)
    assert bool(host.armed_times) == registers


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
        armings = scene.monitor.report().armings
        await asyncio.sleep(1000)
        assert (scene.state(vm), scene.monitor.report().armings) == (State.UNKNOWN, armings)
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


def test_a_vm_that_ends_while_armed_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    vm, other = FakeVm("web", 100, 1), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.STALLED)
        armed = vm.vcpus[0].armed
        scene.host.end(vm)
        await asyncio.sleep(0.1)
        assert scene.monitor.report().vcpus == ()
        assert armed == []

    play(act, vm, other)
    assert [line["msg"] for line in read_lines(caplog)][-1] == "vCPU is gone: its VM has ended"


def test_a_drill_goes_through_everything_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 2)

    async def act(scene: Scene) -> None:
        begun = await scene.monitor.start_drill("web")
        assert (begun.drill, begun.verdict.state, begun.vcpu.index) == (True, State.STALLED, 0)
        with pytest.raises(NoDrill, match="under way"):
            await scene.monitor.start_drill("web")
        await asyncio.sleep(59)
        assert [report.drill for report in scene.monitor.report().vcpus] == [True]
        await asyncio.sleep(2)
        assert scene.monitor.report().vcpus == ()
        with pytest.raises(NoDrill, match="no VM is called 'nobody'"):
            await scene.monitor.start_drill("nobody")

    play(act, vm, trigger=True)
    stall, end = read_lines(caplog)
    assert stall["msg"] == "DRILL, not real: vCPU makes no forward progress"
    assert end["msg"] == "DRILL, not real: vCPU makes progress again"
    assert end["stalled_seconds"] == pytest.approx(61, abs=1)
