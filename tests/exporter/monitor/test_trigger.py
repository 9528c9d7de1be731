"""The trigger: what it reports, what it counts, and what happens where it cannot be attached."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from exporter.stalls.verdicts import State
from kvm.bpf.notify_trigger import TriggerStatus, VcpuThread
from kvm.errors import SourceUnavailable
from kvm.model import Protection
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


def test_a_trigger_that_is_switched_off_is_no_problem() -> None:
    async def act(scene: Scene) -> None:
        assert (scene.monitor.report().trigger, scene.monitor.report().trigger_problem) == ("poll", "")

    play(act, FakeVm("web", 100, 1))
