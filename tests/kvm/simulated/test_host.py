"""The simulated host: the same numbers for the same clock, and something to see."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Protection, SnapshotReader, VmReading
from kvm.simulated.host import (
    CYCLE_SECONDS,
    RARE_SECONDS,
    STUCK_EXITS_PER_SECOND,
    STUCK_FROM_SECONDS,
    STUCK_SECONDS,
    SimulatedHost,
)


@dataclass
class Clock:
    seconds: float = 5000.0

    def read(self) -> float:
        return self.seconds

    def read_unix(self) -> float:
        return 1_800_000_000.0 + self.seconds


def open_host(clock: Clock, vm_count: int = 6, vcpus_per_vm: int | None = None) -> SimulatedHost:
    return SimulatedHost(clock.read, clock.read_unix, vm_count=vm_count, vcpus_per_vm=vcpus_per_vm)


def find_vm(host: SnapshotReader, name: str) -> VmReading:
    return next(reading for reading in host.read().readings if reading.vm.owner.name == name)


def test_one_clock_gives_the_same_numbers() -> None:
    clock, other = Clock(), Clock()
    host, twin = open_host(clock), open_host(other)
    for step in (0.0, 0.1, 7.0, 100.0, 1000.0):
        clock.seconds += step
        other.seconds += step
        assert host.read() == host.read() == twin.read()


def test_everything_says_that_it_is_simulated() -> None:
    snapshot = open_host(Clock()).read()
    assert {reading.source for reading in snapshot.readings} == {"simulated"}
    assert [(report.source, report.up) for report in snapshot.sources] == [("simulated", True)]
    assert "simulated" in snapshot.host.kernel


def test_cast_shows_what_there_is_to_tell_apart() -> None:
    readings = open_host(Clock()).read().readings
    owners = [reading.vm.owner for reading in readings]
    assert {owner.vmm for owner in owners} == {"qemu", "firecracker", "cloud-hypervisor", "homemade-vmm"}
    assert any(owner.project for owner in owners)
    assert any(owner.namespace for owner in owners)
    assert {reading.protection for reading in readings} == {Protection.ARMED, Protection.OFF, Protection.UNKNOWN}
    assert [reading.vm.owner.vmm for reading in readings if reading.counters.totals] == ["homemade-vmm"]


def test_shape_is_what_the_model_promises() -> None:
    clock = Clock()
    host = open_host(clock, vm_count=20)
    first = host.read()
    clock.seconds += 10
    second = host.read()
    assert [reading.vm.id for reading in first.readings] == sorted(reading.vm.id for reading in first.readings)
    assert (
        len({reading.vm.id for reading in first.readings}) == len({reading.vm.key for reading in first.readings}) == 20
    )
    for before, after in zip(first.readings, second.readings, strict=True):
        assert before.vm is after.vm
        assert before.vcpus is after.vcpus
        assert before.vm.start_time_seconds is not None
        assert before.vm.start_time_seconds < first.unix_seconds
        assert tuple(vcpu.vcpu_id for vcpu in before.vcpus) == before.counters.vcpu_ids
        assert tuple(vcpu.tid for vcpu in before.vcpus) == before.counters.tids
        for column in before.counters.per_vcpu.values():
            assert len(column) == len(before.vcpus) == before.vcpu_count


def test_counters_never_fall_and_exits_hold_the_notify_exits() -> None:
    clock = Clock()
    host = open_host(clock)
    before = host.read()
    for _ in range(300):
        clock.seconds += 1.3
        after = host.read()
        for old, new in zip(before.readings, after.readings, strict=True):
            for statistic, column in new.counters.per_vcpu.items():
                assert all(a <= b for a, b in zip(old.counters.per_vcpu[statistic], column, strict=True))
            for statistic, total in new.counters.totals.items():
                assert old.counters.totals[statistic] <= total
            columns = new.counters.per_vcpu
            if columns:
                pairs = zip(columns[NOTIFY_WINDOW_EXITS], columns[EXITS], strict=True)
                assert all(notify <= exits for notify, exits in pairs)
        before = after


def test_one_vcpu_takes_a_notify_exit_now_and_then() -> None:
    clock = Clock()
    host = open_host(clock)
    assert find_vm(host, "web-1").counters.per_vcpu[NOTIFY_WINDOW_EXITS] == (0, 0)
    clock.seconds += 3.5 * RARE_SECONDS
    assert find_vm(host, "web-1").counters.per_vcpu[NOTIFY_WINDOW_EXITS] == (0, 3)


@pytest.mark.parametrize("cycle", [0, 3])
def test_one_vm_gets_stuck_and_recovers(cycle: int) -> None:
    clock = Clock()
    start = clock.seconds + cycle * CYCLE_SECONDS
    host = open_host(clock)

    def look(seconds: float) -> tuple[int, int]:
        clock.seconds = start + seconds
        columns = find_vm(host, "batch-1").counters.per_vcpu
        return columns[NOTIFY_WINDOW_EXITS][0], columns[EXITS][0]

    at_first, before = look(0.0), look(STUCK_FROM_SECONDS)
    assert before[0] == at_first[0] == cycle * STUCK_SECONDS * STUCK_EXITS_PER_SECOND
    assert before[1] > at_first[1] + 1000
    middle, end = look(STUCK_FROM_SECONDS + STUCK_SECONDS / 2), look(STUCK_FROM_SECONDS + STUCK_SECONDS)
    assert middle[0] - before[0] == middle[1] - before[1] == STUCK_EXITS_PER_SECOND * STUCK_SECONDS / 2
    assert end[0] - before[0] == end[1] - before[1] == STUCK_EXITS_PER_SECOND * STUCK_SECONDS
    recovered = look(CYCLE_SECONDS - 1)
    assert recovered[0] == end[0]
    assert recovered[1] > end[1] + 1000


def test_host_can_be_large() -> None:
    readings = open_host(Clock(), vm_count=625, vcpus_per_vm=16).read().readings
    assert sum(reading.vcpu_count or 0 for reading in readings) == 10_000
    tids = [tid for reading in readings for tid in reading.counters.tids]
    assert len(set(tids)) == len(tids)


def test_host_can_be_empty() -> None:
    host = open_host(Clock(), vm_count=0)
    assert host.read().readings == ()
    host.close()
