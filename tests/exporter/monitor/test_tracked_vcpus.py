"""The set of tracked vCPUs: what a snapshot renews, what it misses, and what is dropped with a VM."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.monitor.tracked_vcpu import TrackedVcpu, find_window
from exporter.monitor.tracked_vcpus import MISSING_SECONDS, TrackedVcpus
from exporter.stalls.detector import StallDetector
from exporter.stalls.kernel_evidence import KernelCounts
from exporter.stalls.verdicts import StallRule, State, VcpuFigures
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, NotifyExit, Protection, VcpuKey, VmKey, VmReading
from tests.fake_host import FakeVm


def track(*vms: FakeVm) -> TrackedVcpus:
    tracked = TrackedVcpus()
    for vm in vms:
        for vcpu in vm.read().vcpus:
            key = VcpuKey(vm.key, vcpu.vcpu_id)
            tracked.add(TrackedVcpu(key, vm.vm, vcpu, "bpf", StallDetector(StallRule(), 0.0)))
    return tracked


def read(*vms: FakeVm) -> dict[VmKey, VmReading]:
    return {vm.key: vm.read() for vm in vms}


def test_each_vcpu_is_renewed_with_its_own_counters() -> None:
    vm, other = FakeVm("web", 100, 3), FakeVm("db", 200, 1)
    tracked = track(vm, other)
    for number, vcpu in enumerate([*vm.vcpus, *other.vcpus]):
        vcpu.notify_exits, vcpu.exits = number, 10 * number
    found = {(vcpu.key.vm, vcpu.vcpu.index): counts for vcpu, counts in tracked.renew(read(vm, other), 1.0)}
    assert found == {(vm.key, 0): (0, 0), (vm.key, 1): (1, 10), (vm.key, 2): (2, 20), (other.key, 0): (3, 30)}


def test_figures_are_the_same_objects_until_they_change() -> None:
    vm, other = FakeVm("web", 100, 2), FakeVm("db", 200, 1)
    tracked = track(vm, other)
    vcpu = next(iter(tracked))
    before = tracked.find_figures()
    assert before[vm.key].vcpus[0] == VcpuFigures(State.QUIET, None, 0, 0, can_judge=True)
    vcpu.detector.observe_trigger(1.0)
    now = tracked.find_figures()
    assert now[vm.key].vcpus[0].state is State.NOTIFYING
    assert now[vm.key].vcpus[2] == before[vm.key].vcpus[2]
    assert before[vm.key].vcpus[0].state is State.QUIET
    assert now[other.key] is before[other.key]
    reading = vm.read()
    hidden = replace(reading, vcpus=tuple(replace(vcpu, tid=None) for vcpu in reading.vcpus))
    assert len([*tracked.renew({vm.key: hidden} | read(other), 1.0)]) == 3
    assert not tracked.find_figures()[vm.key].vcpus[0].can_judge


def test_figures_follow_vcpus_that_come_and_go() -> None:
    vm = FakeVm("web", 100, 2)
    tracked = track(vm)
    assert set(tracked.find_figures()[vm.key].vcpus) == {0, 2}
    gone = tracked.drop(VcpuKey(vm.key, 2))
    assert set(tracked.find_figures()[vm.key].vcpus) == {0}
    assert gone is not None
    tracked.add(gone)
    assert set(tracked.find_figures()[vm.key].vcpus) == {0, 2}
    tracked.drop_vm(vm.key)
    assert tracked.find_figures() == {}


def test_figures_count_the_stalled() -> None:
    vm = FakeVm("web", 100, 3)
    tracked = track(vm)
    detectors = [vcpu.detector for vcpu in tracked]
    assert tracked.find_figures()[vm.key].stalled == 0
    for detector in detectors[:2]:
        records = [NotifyExit(n * 10**8, 7, 0x1000, 0, 0) for n in range(40)]
        detector.start_window(0.0)
        detector.observe_records(4.0, records)
    found = tracked.find_figures()[vm.key]
    assert found.stalled == sum(vcpu.state is State.STALLED for vcpu in found.vcpus.values()) == 2
    detectors[0].observe_records(5.0, [], other_rip=True)
    assert tracked.find_figures()[vm.key].stalled == 1
    tracked.drop(VcpuKey(vm.key, 2))
    assert tracked.find_figures()[vm.key].stalled == 0


class AskedAtItsThread(TrackedVcpu):
    """Has the figures asked for when its thread becomes another, as a scrape may in its thread."""

    tracked: TrackedVcpus | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "vcpu" and AskedAtItsThread.tracked is not None:
            AskedAtItsThread.tracked.find_figures()
        super().__setattr__(name, value)


def test_a_thread_that_becomes_another_while_figures_are_asked_for_is_not_overlooked() -> None:
    vm, tracked = FakeVm("web", 100, 1), TrackedVcpus()
    reading = vm.read()
    hidden = replace(reading, vcpus=tuple(replace(vcpu, tid=None) for vcpu in reading.vcpus))
    detector = StallDetector(StallRule(), 0.0)
    tracked.add(AskedAtItsThread(VcpuKey(vm.key, 0), vm.vm, hidden.vcpus[0], "bpf", detector))
    assert not tracked.find_figures()[vm.key].vcpus[0].can_judge
    AskedAtItsThread.tracked = tracked
    try:
        assert len([*tracked.renew({vm.key: reading}, 1.0)]) == 1
    finally:
        AskedAtItsThread.tracked = None
    assert tracked.find_figures()[vm.key].vcpus[0].can_judge


def test_what_becomes_of_a_vcpu_that_was_dropped_is_not_told() -> None:
    vm = FakeVm("web", 100, 2)
    tracked = track(vm)
    gone = tracked.drop(VcpuKey(vm.key, 0))
    assert gone is not None
    gone.detector.observe_trigger(1.0)  # as at the end of a session
    assert set(tracked.find_figures()[vm.key].vcpus) == {2}
    for vcpu in tracked.drop_vm(vm.key):
        vcpu.detector.observe_trigger(2.0)
    assert tracked.find_figures() == {}


def test_of_vms_that_have_ended_nothing_is_left_though_nobody_asks() -> None:
    tracked, vm = TrackedVcpus(), FakeVm("web", 100, 1)
    (thread,) = vm.read().vcpus
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for pid in range(1000, 3000):
            key = VcpuKey(VmKey(pid, 1, 9), 0)
            tracked.add(TrackedVcpu(key, vm.vm, thread, "bpf", StallDetector(StallRule(), 0.0)))
            tracked.drop_vm(key.vm)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 50_000  # 25 bytes a VM; a key takes 100


class AskedMeanwhile(StallDetector):
    """Has the figures asked for at each change of its own, as a scrape may in its thread."""

    tracked: TrackedVcpus | None = None

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if self.tracked is not None:
            assert self.tracked.find_figures()


@pytest.mark.parametrize("evidence", ["records", "kernel"])
def test_figures_that_are_asked_for_during_a_change_are_not_kept(evidence: str) -> None:
    vm, detector = FakeVm("web", 100, 1), AskedMeanwhile(StallRule(), 0.0)
    (thread,) = vm.read().vcpus
    tracked = TrackedVcpus()
    tracked.add(TrackedVcpu(VcpuKey(vm.key, 0), vm.vm, thread, "bpf", detector))
    detector.tracked = tracked
    counts = KernelCounts(10, 10, 0, 0x1000, False, 11, 11, 100, 0)
    for second in range(1, 5):  # it is suspected after two: from then on nothing but the counts changes
        if evidence == "records":
            detector.observe_records(second, [NotifyExit(second * 10**9, 7, 0x1000, 0, 0)])
        else:
            repeats = 10 + second
            more = replace(counts, same_rip_exits=repeats, stuck_exits=repeats, streak=repeats + 1)
            detector.observe_kernel(second, second, replace(more, notify_exits=repeats + 1, exits=100 + second))
        assert tracked.find_figures()[vm.key].vcpus[0][2:4] == (detector.traced_exits, detector.same_rip_exits)
    assert (detector.state, detector.same_rip_exits) == (State.SUSPECT, 3)


def test_a_vcpu_that_a_snapshot_lacks_is_gone_after_a_minute_and_one_that_comes_back_is_not() -> None:
    vm, away, back = FakeVm("web", 100, 2), FakeVm("away", 200, 1), FakeVm("back", 300, 1)
    tracked = track(vm, away, back)
    unplugged = VcpuKey(vm.key, 2)
    vm.vcpus.pop()
    counts = {vcpu.key: counts for vcpu, counts in tracked.renew(read(vm), 5.0)}
    assert counts[unplugged] is None
    tracked.renew(read(vm, back), 30.0)
    assert (tracked.any_missing, tracked.gone_at) == (True, 5.0 + MISSING_SECONDS)
    assert tracked.list_gone(4.9 + MISSING_SECONDS) == []
    assert set(tracked.list_gone(5.0 + MISSING_SECONDS)) == {unplugged, VcpuKey(away.key, 0)}


def test_a_vm_that_cannot_be_read_shows_no_vcpu_and_none_is_missing() -> None:
    vm = FakeVm("web", 100, 2)
    tracked = track(vm)
    vm.is_readable = False
    assert [counts for _, counts in tracked.renew(read(vm), 1.0)] == [None, None]
    assert not tracked.any_missing


def read_others(reading: VmReading, **per_vcpu: tuple[int, ...]) -> VmReading:
    """The same reading with these columns."""
    return replace(reading, counters=reading.counters._replace(per_vcpu=per_vcpu))


def cut(reading: VmReading) -> VmReading:
    return read_others(reading, **{name: column[:-1] for name, column in reading.counters.per_vcpu.items()})


def move_threads(reading: VmReading) -> VmReading:
    return replace(reading, vcpus=tuple([replace(vcpu, tid=900 + vcpu.index) for vcpu in reading.vcpus]))


CHANGES: dict[str, Callable[[VmReading], VmReading]] = {
    "numbers": lambda reading: reading,
    "its threads": move_threads,
    "a vCPU is away": lambda reading: replace(cut(reading), vcpus=reading.vcpus[:-1]),
    "it cannot be read": lambda reading: replace(read_others(reading), vcpus=()),
    "its exits are not read": lambda reading: read_others(
        reading, notify_window_exits=reading.counters.per_vcpu[NOTIFY_WINDOW_EXITS]
    ),
    "a column is too short": cut,
    "its source": lambda reading: replace(reading, source="stats_fd"),
    "its window": lambda reading: replace(reading, counters=reading.counters._replace(notify_window_cycles=77)),
    "its protection": lambda reading: replace(reading, protection=Protection.OFF),
    "its name": lambda reading: replace(reading, vm=replace(reading.vm, id="other")),
}


def expect_counts(reading: VmReading, vcpu_id: int) -> tuple[int, int | None] | None:
    """What a reading says of a vCPU, found in the simplest way."""
    columns = [reading.counters.per_vcpu.get(name, ()) for name in (NOTIFY_WINDOW_EXITS, EXITS)]
    notify, exits = (dict(zip((vcpu.vcpu_id for vcpu in reading.vcpus), column, strict=False)) for column in columns)
    return (notify[vcpu_id], exits.get(vcpu_id)) if vcpu_id in notify else None


@given(st.lists(st.tuples(st.none() | st.sampled_from([*CHANGES]), st.booleans()), max_size=12))
def test_what_is_renewed_follows_from_the_newest_snapshot_alone(steps: list[tuple[str | None, bool]]) -> None:
    """None is a snapshot without the VM; and the last vCPU is tracked at times."""
    vm = FakeVm("web", 100, 3)
    tracked, usual = track(vm), vm.read()
    last = tracked.of_vm(vm.key)[usual.vcpus[-1].vcpu_id]
    for now, (change, tracks_last) in enumerate(steps):
        if tracks_last is not (last in [*tracked]):
            tracked.add(last) if tracks_last else tracked.drop(last.key)
        numbers = read_others(usual, notify_window_exits=(now, now + 1, now + 2), exits=(now + 7, now + 8, now + 9))
        if change is None:
            assert [counts for _, counts in tracked.renew({}, now)] == [None] * (2 + tracks_last)
            assert len(tracked.list_gone(now + MISSING_SECONDS)) == 2 + tracks_last
            continue
        reading = CHANGES[change](numbers)
        found = tracked.renew({vm.key: reading}, now)
        assert [vcpu for vcpu, _ in found] == [*tracked]
        assert [counts for _, counts in found] == [expect_counts(reading, vcpu.key.vcpu_id) for vcpu, _ in found]
        shown = {vcpu.vcpu_id: vcpu for vcpu in reading.vcpus}
        missing = {vcpu.key for vcpu, _ in found if vcpu.key.vcpu_id not in shown and shown}
        assert set(tracked.list_gone(now + MISSING_SECONDS)) == missing
        for vcpu, _ in found:
            assert (vcpu.vm, vcpu.source, vcpu.window_cycles) == (reading.vm, reading.source, find_window(reading))
            assert vcpu.vcpu is shown.get(vcpu.key.vcpu_id, vcpu.vcpu)


def test_what_is_dropped_is_in_none_of_the_sets() -> None:
    vm, other = FakeVm("web", 100, 2), FakeVm("db", 200, 1)
    tracked = track(vm, other)
    for vcpu in tracked:
        tracked.active[vcpu.key] = vcpu
    tracked.renew({}, 1.0)
    assert {vcpu.vcpu.index for vcpu in tracked.drop_vm(vm.key)} == {0, 1}
    assert [vcpu.key.vm for vcpu in tracked] == [other.key] == [key.vm for key in tracked.active]
    assert tracked.list_gone(1000.0) == [VcpuKey(other.key, 0)]
    assert tracked.drop(VcpuKey(vm.key, 0)) is None
    assert tracked.drop_vm(vm.key) == []


@pytest.mark.parametrize("change", ["add", "drop"])
def test_what_changes_under_an_iteration_does_not_break_it(change: str) -> None:
    vm, other = FakeVm("web", 100, 2), FakeVm("db", 200, 1)
    tracked = track(vm)
    seen = 0
    for vcpu in tracked:
        seen += 1
        if change == "drop":
            tracked.drop_vm(vcpu.key.vm)
        else:
            for extra in track(other):
                tracked.add(extra)
    assert seen == 2
