"""What tracing costs: duty cycles, limits, lost records, and threads that cannot be traced."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Sequence
from itertools import pairwise

import pytest

from exporter.monitor.stall_monitor import RECONSIDER_SECONDS
from exporter.monitor.trace_budget import Limits
from exporter.monitor.tracked_vcpu import OTHERS_FIRST
from exporter.stalls.detector import QUIET_SECONDS
from exporter.stalls.verdicts import StallRule, State
from kvm.errors import SourceUnavailable
from kvm.model import VcpuKey
from tests.exporter.monitor.scene import Scene, play
from tests.fake_host import FakeHost, FakeVm


def test_a_slow_stall_is_found_within_its_budget() -> None:
    """One exit every two seconds: ten take several sessions."""
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=1.0)
        assert await scene.wait_for(vm, State.STALLED, 300) < 200

    host = play(act, vm)
    check_duty_cycle(host)


def check_duty_cycle(host: FakeHost, duty_cycle: float = 0.1, window: float = 60.0) -> None:
    """No thread was armed for more than its duty cycle of any minute after its first session."""
    for tid in {tid for tid, _, _ in host.armed_times}:
        sessions = sorted((began, ended) for found, began, ended in host.armed_times if found == tid)[1:]
        for start in [ended - window for _, ended in sessions]:
            used = sum(max(0.0, min(ended, start + window) - max(began, start)) for began, ended in sessions)
            assert used <= duty_cycle * window + 0.3, (tid, used)


def test_a_vcpu_that_goes_on_is_traced_though_its_quota_is_used_up() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.SUSPECT)
        await asyncio.sleep(30)
        assert scene.monitor.report().budget_exhausted > 0
        scene.host.set(vm.vcpus[0], "running")
        assert await scene.wait_for(vm, State.PROGRESSING, 15) < 3

    play(act, vm, registers=False, rule=StallRule(seconds=1000.0))


def test_the_tracepoint_stays_for_a_minute_after_the_last_session() -> None:
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
        report = scene.monitor.report()
        assert report.budget_exhausted > 0
        assert report.warnings <= 2 + 6

    host = play(act, flood, victim, trigger=True)
    assert host.most_armed <= 4 + 1
    check_duty_cycle(host)


def test_who_does_nothing_else_is_called_among_many_who_take_notify_exits_now_and_then() -> None:
    """After a bad microcode update every vCPU takes them; and registers, which show progress at once, may be hidden."""
    vms = [FakeVm(f"vm{number}", 1000 * (number + 1), 4) for number in range(15)]

    async def act(scene: Scene) -> None:
        for vcpu in (vcpu for vm in vms for vcpu in vm.vcpus):
            scene.host.set(vcpu, "notified now and then", interval=1.0)
        await asyncio.sleep(3)
        scene.host.set(vms[-1].vcpus[-1], "stuck", interval=0.025)
        assert await scene.wait_for(vms[-1], State.STALLED, vcpu=3, seconds=100) < 5

    play(act, *vms, trigger=True, registers=False, limits=Limits(host=1))


ONE_AT_ONCE = Limits(host=1)
POLLS_SECONDS = 2.5  # in which the counters of a host of 40 vCPUs are read twice


async def flood(scene: Scene, vms: Sequence[FakeVm]) -> None:
    """Let all vCPUs take notify exits, beside many others; nearly all of them wait for a trace session."""
    for vm in vms:
        for vcpu in vm.vcpus:
            scene.host.set(vcpu, "notified now and then", interval=0.2)
    await asyncio.sleep(12)


def find_considered(scene: Scene) -> dict[VcpuKey, float]:
    """When it was asked last of each vCPU whether it is to be traced."""
    return {vcpu.key: vcpu.considered_at for vcpu in scene.monitor._tracked}


async def wait_considered(scene: Scene, key: VcpuKey) -> float:
    """Wait until that is asked of a vCPU again; returns after how many seconds."""
    began, before = scene.host.clock(), find_considered(scene)[key]
    while find_considered(scene)[key] == before:
        assert scene.host.clock() < began + 30.0
        await asyncio.sleep(0.05)
    return scene.host.clock() - began


def test_of_many_who_wait_it_is_asked_now_and_then_whether_they_are_to_be_traced() -> None:
    vms = [FakeVm(f"vm{number}", 1000 * (number + 1), 4) for number in range(10)]

    async def act(scene: Scene) -> None:
        await flood(scene, vms)
        asked: dict[VcpuKey, set[float]] = {}
        for _ in range(200):
            await asyncio.sleep(0.1)
            for key, considered_at in find_considered(scene).items():
                asked.setdefault(key, set()).add(considered_at)
        assert len(asked) == 40
        assert statistics.median(len(times) for times in asked.values()) <= 6, "not at each of twenty polls"
        for times in asked.values():
            assert max(later - sooner for sooner, later in pairwise(sorted(times))) <= RECONSIDER_SECONDS + 2
            assert len(times) >= 4

    play(act, *vms, limits=ONE_AT_ONCE)


@pytest.mark.parametrize("idle_seconds", [0.0, QUIET_SECONDS + 5])
def test_who_does_something_new_is_asked_at_once(idle_seconds: float) -> None:
    """Who takes hardly any other exits from now on, or takes notify exits again."""
    vms = [FakeVm(f"vm{number}", 1000 * (number + 1), 4) for number in range(10)]
    vm = vms[5]
    key = VcpuKey(vm.key, vm.read().vcpus[1].vcpu_id)

    async def act(scene: Scene) -> None:
        await flood(scene, vms)
        if idle_seconds:
            scene.host.set(vm.vcpus[1], "idle")
            await asyncio.sleep(idle_seconds)
        await wait_considered(scene, key)
        scene.host.set(vm.vcpus[1], "notified now and then" if idle_seconds else "stuck", interval=0.2)
        assert await wait_considered(scene, key) <= POLLS_SECONDS < RECONSIDER_SECONDS - 1

    play(act, *vms, limits=ONE_AT_ONCE)


def test_no_more_than_16_threads_are_armed_at_once() -> None:
    vms = [FakeVm(f"vm{number}", 1000 * (number + 1), 4) for number in range(10)]

    async def act(scene: Scene) -> None:
        for vm in vms:
            for vcpu in vm.vcpus:
                scene.host.set(vcpu, "stuck", interval=0.05)
        await asyncio.sleep(60)
        assert all(scene.state(vm, vcpu) is State.STALLED for vm in vms for vcpu in range(4))
        assert scene.monitor.report().warnings <= 10

    assert play(act, *vms).most_armed == 16


def test_a_guest_that_stops_just_before_each_session_is_not_stalled_and_not_traced_all_the_time() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        for _ in range(120):
            scene.host.set(vm.vcpus[0], "alternating")
            await asyncio.sleep(0.5)
            scene.host.set(vm.vcpus[0], "idle")
            await asyncio.sleep(0.5)
        assert scene.state(vm) is not State.STALLED

    check_duty_cycle(play(act, vm))


def test_lost_records_are_counted_and_prove_nothing() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.loses = True
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(30)
        report = scene.monitor.report()
        assert report.lost_records > 0
        assert (report.records, report.warnings, scene.state(vm)) == (0, 0, State.NOTIFYING)

    play(act, vm)


def test_a_thread_that_dies_while_armed_ends_the_session(caplog: pytest.LogCaptureFixture) -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await scene.wait_for(vm, State.SUSPECT)
        scene.host.dead_threads.add(vm.vcpus[0].tid)
        await asyncio.sleep(10)
        report = scene.monitor.report()
        assert (report.traced_vcpus, report.problem) == (0, "")

    play(act, vm)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_tid_that_belongs_to_somebody_else_by_now_is_left_alone() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.strangers.add(vm.vcpus[0].tid)
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(10)
        assert scene.monitor.report().records == 0
        assert scene.state(vm) is State.NOTIFYING

    play(act, vm)


def test_without_a_tracer_it_says_so_and_judges_nobody() -> None:
    vm = FakeVm("web", 100, 1)

    def prepare(host: FakeHost) -> None:
        host.refusal = SourceUnavailable("no CAP_PERFMON", "give it")

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck")
        await asyncio.sleep(5)
        report = scene.monitor.report()
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
        assert scene.monitor.report().problem == ""
        assert scene.state(vm) is State.NOTIFYING

    play(act, vm, other)
    told = [record for record in caplog.records if record.getMessage() == "the exits of a vCPU cannot be traced"]
    assert len(told) == 1


def test_the_shortest_interval_is_known_by_window() -> None:
    vm = FakeVm("web", 100, 1)

    async def act(scene: Scene) -> None:
        scene.host.set(vm.vcpus[0], "stuck", interval=0.02)
        await scene.wait_for(vm, State.STALLED)
        await asyncio.sleep(1)
        assert scene.monitor.report().interval_min_seconds == {128_000: pytest.approx(0.02)}

    play(act, vm)


def test_why_a_vcpu_is_not_traced_is_told() -> None:
    vm, refused = FakeVm("web", 100, 5), FakeVm("db", 200, 1)

    async def act(scene: Scene) -> None:
        scene.host.refused_threads.add(refused.vcpus[0].tid)
        for vcpu in (*vm.vcpus, *refused.vcpus):
            scene.host.set(vcpu, "stuck", interval=0.1)
        await asyncio.sleep(0.6)
        found = [scene.find(vm, number) for number in range(5)]
        assert sorted(report.deferred_reason for report in found if report) == ["", "", "", "", OTHERS_FIRST]
        await asyncio.sleep(2)  # its counter has told meanwhile that it goes on
        told = scene.find(refused)
        assert told is not None
        assert "SELinux forbids it" in told.deferred_reason

    play(act, vm, refused, trigger=True)


def test_the_next_session_begins_as_soon_as_one_has_ended() -> None:
    vm = FakeVm("web", 100, 8)

    async def act(scene: Scene) -> None:
        for vcpu in vm.vcpus:
            scene.host.set(vcpu, "alternating", interval=0.05)
        await asyncio.sleep(10)
        began = sorted(scene.host.armed_times, key=lambda times: times[1])
        fourth, fifth = began[3], began[4]
        assert fifth[1] - min(ended for _, _, ended in began[:4]) < 0.02, (fourth, fifth)

    play(act, vm, trigger=True)


def test_the_tracepoint_is_not_let_go_under_a_session() -> None:
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
        sessions = [times for times in scene.host.armed_times if times[0] == vm.vcpus[1].tid]
        assert sessions[0][1] < ended + 60 < sessions[0][2]

    assert not play(act, vm, trigger=True).cooled_while_armed
