"""What counts as an increase of the notify counter, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.history.increases import MAX_MISSING, MEMORY_SECONDS, IncreaseTracker
from kvm.model import (
    NOTIFY_WINDOW_EXITS,
    Host,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)

HOST = Host("", "", "", "", "", "", "", "", "", None)
START = 1_000_000.0
OLD, KEY = START - 500.0, VmKey(100, 7, 9)
UP = (SourceReport("bpf", True),)
IDS: dict[tuple[int, ...], tuple[int, ...]] = {}


def read_vm(
    values: Mapping[int, int] | None = None,
    *,
    total: int | None = None,
    count: int | None = None,
    key: VmKey = KEY,
    started: float | None = OLD,
    same_ids: bool = True,
) -> VmReading:
    """A reading with these counts by vcpu_id, or this sum, or neither; ``count`` vCPUs, all that were read if None.

    ``same_ids``: the ids of the same vCPUs are the same object, as sources give them while nothing changes.
    """
    ids = tuple(values or ())
    column = {} if values is None else {NOTIFY_WINDOW_EXITS: tuple(values.values())}
    counters = VmCounters(
        vcpu_ids=IDS.setdefault(ids, ids) if same_ids else ids,
        per_vcpu=column,
        totals={} if total is None else {NOTIFY_WINDOW_EXITS: total},
    )
    vm = Vm(id=f"vm-{key.pid}-{key.vm_fd}", key=key, owner=Owner("qemu"), start_time_seconds=started)
    return VmReading(vm, "bpf", (), len(values or ()) if count is None else count, counters, Protection.UNKNOWN)


class Snapshots:
    """Takes snapshots of a host, ten seconds apart."""

    def __init__(self, *, tells_changes: bool = True) -> None:
        """``tells_changes``: a snapshot tells that nothing but numbers has changed."""
        self.movements = IncreaseTracker()
        self.seconds = 0.0
        self._tells_changes = tells_changes
        self._compositions: dict[object, object] = {}

    def take(self, *readings: VmReading, sources: tuple[SourceReport, ...] = UP) -> int:
        """Take one and return the sum of increases so far."""
        told = tuple((reading.vm, reading.vcpu_count, reading.counters.vcpu_ids) for reading in readings)
        composition = self._compositions.setdefault(told, object()) if self._tells_changes else object()
        snapshot = Snapshot(self.seconds, START + self.seconds, HOST, readings, sources, {}, composition=composition)
        self.movements.observe(snapshot)
        self.seconds += 10.0
        return self.movements.increases_total


@pytest.fixture(params=[True, False])
def snapshots(request: pytest.FixtureRequest) -> Snapshots:
    return Snapshots(tells_changes=request.param)


def test_history_is_no_increase(snapshots: Snapshots) -> None:
    assert snapshots.take(read_vm({0: 1000, 1: 5})) == 0
    assert snapshots.take(read_vm({0: 1000, 1: 5})) == 0
    assert snapshots.movements.last_moves(KEY) == {}


def test_increases_add_up_and_are_dated(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 1000, 1: 5}))
    assert snapshots.take(read_vm({0: 1003, 1: 5})) == 3
    assert snapshots.take(read_vm({0: 1003, 1: 5})) == 3
    assert snapshots.take(read_vm({0: 1003, 1: 7})) == 5
    assert snapshots.movements.last_moves(KEY) == {0: START + 10, 1: START + 30}


def test_gone_vm_stays_in_the_sum(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 0}))
    snapshots.take(read_vm({0: 4}))
    assert snapshots.take() == 4


def test_new_vm_counts_from_zero(snapshots: Snapshots) -> None:
    snapshots.take()
    assert snapshots.take(read_vm({0: 6, 1: 0}, started=START + 3)) == 6
    assert snapshots.movements.last_moves(KEY) == {0: START + 10}


@pytest.mark.parametrize("started", [OLD, None])
def test_vm_that_is_read_late_has_a_history(snapshots: Snapshots, started: float | None) -> None:
    snapshots.take(read_vm(count=2, started=started))
    assert snapshots.take(read_vm({0: 6, 1: 0}, started=started)) == 0
    assert snapshots.take(read_vm({0: 7, 1: 0}, started=started)) == 1


@pytest.mark.parametrize("same_ids", [True, False])
def test_reset_counts_the_new_value(snapshots: Snapshots, same_ids: bool) -> None:
    read = partial(read_vm, same_ids=same_ids)
    snapshots.take(read({0: 50}))
    assert snapshots.take(read({0: 0})) == 0
    assert snapshots.movements.last_moves(KEY) == {}
    assert snapshots.take(read({0: 3})) == 3
    assert snapshots.take(read({0: 2})) == 5
    assert snapshots.movements.last_moves(KEY) == {0: START + 30}


def test_hot_plugged_vcpu_counts_from_zero(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 50}))
    assert snapshots.take(read_vm({0: 50, 1: 2})) == 2


def test_vcpu_of_an_incomplete_snapshot_has_a_history(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 50}, count=2))
    assert snapshots.take(read_vm({0: 50, 1: 900})) == 0
    assert snapshots.take(read_vm({0: 50, 1: 901})) == 1


def test_vcpu_that_was_missing_goes_on_where_it_was(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 50, 1: 60}))
    assert snapshots.take(read_vm({0: 51}, count=2)) == 1
    assert snapshots.take(read_vm({0: 51, 1: 62})) == 3


def test_parked_vcpu_is_not_counted_twice(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 0, 1: 0}, started=START))
    assert snapshots.take(read_vm({0: 0, 1: 8}, started=START)) == 8
    assert snapshots.take(read_vm({0: 0}, started=START)) == 8
    assert snapshots.take(read_vm({0: 0, 1: 8}, started=START)) == 8


def test_unread_vm_goes_on_where_it_was(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 50}))
    assert snapshots.take(read_vm(count=1)) == 0
    assert snapshots.take(read_vm({0: 52})) == 2


def test_vm_that_was_out_of_sight_is_not_counted_twice(snapshots: Snapshots) -> None:
    snapshots.take()
    new = START + 1
    assert snapshots.take(read_vm({0: 5}, started=new)) == 5
    snapshots.take()
    assert snapshots.take(read_vm({0: 6}, started=new)) == 6
    snapshots.seconds += MEMORY_SECONDS + 1
    snapshots.take()
    assert snapshots.take(read_vm({0: 9}, started=new)) == 6
    assert snapshots.take(read_vm({0: 10}, started=new)) == 7
    newer = read_vm({0: 2}, key=VmKey(101, 8, 9), started=new + 1)
    assert snapshots.take(newer) == 9


def test_one_that_stands_still_is_seen_and_one_that_is_missing_is_forgotten_meanwhile(snapshots: Snapshots) -> None:
    missing = VmKey(101, 8, 9)
    snapshots.take(read_vm({0: 1}), read_vm({0: 0}, key=missing, started=START + 1))
    still = read_vm({0: 1})
    snapshots.take(still)
    for _ in range(5):
        snapshots.seconds += MEMORY_SECONDS / 2
        seconds = (snapshots.seconds, START + snapshots.seconds)
        snapshots.movements.observe_same(Snapshot(*seconds, HOST, (still,), UP, MappingProxyType({})))
    assert snapshots.take(read_vm({0: 4})) == 3
    # It came before what was forgotten: from zero it may have counted then.
    assert snapshots.take(read_vm({0: 4}), read_vm({0: 9}, key=missing, started=START + 1)) == 3


def test_sums_are_followed_too(snapshots: Snapshots) -> None:
    other = VmKey(101, 8, 9)
    assert snapshots.take(read_vm(total=100, count=2)) == 0
    assert snapshots.take(read_vm(total=103, count=2)) == 3
    assert snapshots.take(read_vm(total=2, count=2)) == 5
    assert snapshots.take(read_vm(total=2, count=2), read_vm(total=7, count=2, key=other, started=START + 25)) == 12
    assert snapshots.movements.last_moves(KEY) == {}


def test_change_of_source_is_compared_by_sum(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 10, 1: 20}))
    assert snapshots.take(read_vm(total=31, count=2)) == 1
    assert snapshots.take(read_vm({0: 11, 1: 22})) == 3
    assert snapshots.take(read_vm({0: 11, 1: 23})) == 4
    assert snapshots.take(read_vm(total=20, count=2)) == 4
    assert snapshots.take(read_vm(total=21, count=2)) == 5


def test_change_of_source_of_an_incomplete_vm_starts_anew(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 10}, count=2))
    assert snapshots.take(read_vm(total=100, count=2)) == 0
    assert snapshots.take(read_vm({0: 12}, count=2)) == 0
    assert snapshots.take(read_vm({0: 13, 1: 90})) == 1


def test_new_vm_that_was_a_sum_is_not_counted_twice(snapshots: Snapshots) -> None:
    snapshots.take()
    new = START + 5
    assert snapshots.take(read_vm(total=10, count=2, started=new)) == 10
    assert snapshots.take(read_vm({0: 5}, count=2, started=new)) == 10
    assert snapshots.take(read_vm({0: 5, 1: 5}, started=new)) == 10


def test_malformed_column_changes_nothing(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 10}))
    broken = VmCounters(vcpu_ids=(0,), per_vcpu={NOTIFY_WINDOW_EXITS: (1, 2)})
    reading = read_vm({0: 10})
    assert snapshots.take(VmReading(reading.vm, "bpf", (), 1, broken, Protection.UNKNOWN)) == 0
    assert snapshots.take(read_vm({0: 11})) == 1


def test_without_a_source_nothing_is_known(snapshots: Snapshots) -> None:
    snapshots.take(sources=(SourceReport("bpf", False),))
    assert not snapshots.movements.readable
    snapshots.take()
    assert snapshots.movements.readable
    snapshots.take(sources=())
    assert snapshots.movements.readable


def test_unknown_vm_never_moved(snapshots: Snapshots) -> None:
    assert snapshots.movements.last_moves(KEY) == {}


three_numbers = st.lists(st.integers(0, 5), min_size=3, max_size=3)


ways = st.tuples(three_numbers, st.integers(0, 6))


@given(st.booleans(), st.booleans(), three_numbers, st.lists(ways, min_size=1, max_size=12))
def test_sum_is_never_too_high_and_never_falls(
    new: bool, same_ids: bool, history: list[int], steps: list[tuple[list[int], int]]
) -> None:
    """Three vCPUs, read whole, in part, as a sum, or not at all, hot-unplugged, out of sight: in any order."""
    snapshots, started = Snapshots(), START + 1 if new else OLD
    values, highest, past = ([0, 0, 0], 0, 0) if new else (history, 0, sum(history))
    # A vCPU that is parked before anybody has seen it is out of scope: its fd stays open, so it is seen.
    seen_all = new
    if new:
        snapshots.take()
    for number, (growth, way) in enumerate(steps):
        if new or number:
            values = [value + more for value, more in zip(values, growth, strict=True)]
        by_id, read = dict(enumerate(values)), partial(read_vm, started=started, same_ids=same_ids)
        readings: list[list[VmReading]] = [
            [read(by_id)],
            [read({1: values[1]}, count=3)],
            [read({0: values[0], 2: values[2]}, count=3)],
            [read(total=sum(values), count=3)],
            [read(count=3)],
            [read({0: values[0], 1: values[1]})] if seen_all else [],
            [],
        ]
        total = snapshots.take(*readings[way])
        seen_all = seen_all or way == 0
        assert highest <= total <= sum(values) - past
        highest = total


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=12), st.booleans())
def test_nothing_is_lost_while_everything_is_read(steps: list[list[int]], same_ids: bool) -> None:
    snapshots, values = Snapshots(), [1000, 0]
    snapshots.take(read_vm(dict(enumerate(values))))
    for growth in steps:
        values = [value + more for value, more in zip(values, growth, strict=True)]
        assert snapshots.take(read_vm(dict(enumerate(values)), same_ids=same_ids)) == sum(values) - 1000


def test_vms_that_are_made_by_the_thousand_are_forgotten_sooner(snapshots: Snapshots) -> None:
    """Those first that never took an exit: who did goes on where it was, should it come back into sight."""
    snapshots.take(read_vm({0: 7}))
    assert snapshots.take(read_vm({0: 9})) == 2
    for first in range(0, 4 * MAX_MISSING, 500):
        snapshots.take(*(read_vm({0: 0}, key=VmKey(200, 8, first + number)) for number in range(500)))
        snapshots.seconds -= 9.9
        assert len(snapshots.movements._memories) <= MAX_MISSING + 500
    assert snapshots.take(read_vm({0: 10})) == 3


def test_a_vm_in_anothers_place_is_no_increase(snapshots: Snapshots) -> None:
    snapshots.take(read_vm({0: 1, 1: 1}))
    assert snapshots.take(read_vm({0: 9, 1: 9}, key=VmKey(101, 8, 9))) == 0
    assert snapshots.movements.all_moved_at is None


def test_a_sum_counts_also_where_every_vcpu_of_the_other_vms_has_moved(snapshots: Snapshots) -> None:
    other = VmKey(101, 8, 9)
    totals = []
    for number in range(3):
        totals.append(snapshots.take(read_vm({0: number}), read_vm(total=10 * number, count=2, key=other)))
    assert totals == [0, 11, 22]
    assert snapshots.movements.all_moved_at is None


def leave_unread(*vcpu_ids: int) -> VmReading:
    reading = read_vm(dict.fromkeys(vcpu_ids, 0))
    return replace(reading, counters=reading.counters._replace(per_vcpu={}))


def test_vcpus_that_came_while_nothing_could_be_read_are_not_taken_for_those_before(snapshots: Snapshots) -> None:
    for number in range(2):
        snapshots.take(read_vm({0: number, 1: number}))
    snapshots.take(leave_unread(0, 2))
    assert snapshots.movements.all_moved_at is None
    assert snapshots.take(read_vm({0: 5, 2: 7})) == 2 + 4 + 7  # it was plugged into a VM that had been read whole


def test_numbers_of_fewer_vcpus_than_there_are_tell_nothing(snapshots: Snapshots) -> None:
    whole = read_vm({0: 1, 1: 1})
    snapshots.take(whole)
    fewer = replace(whole, counters=whole.counters._replace(per_vcpu={NOTIFY_WINDOW_EXITS: (9,)}))
    assert snapshots.take(fewer) == 0
    assert snapshots.take(read_vm({0: 2, 1: 2})) == 2


def test_a_flood_is_one_time_of_all_vcpus_until_one_stands_still(snapshots: Snapshots) -> None:
    other = VmKey(101, 8, 9)
    times = []
    for first, second in ((0, 0), (1, 1), (2, 3), (4, 3), (5, 5)):
        snapshots.take(read_vm({0: first, 1: first}), read_vm({0: second}, key=other))
        times.append(snapshots.movements.all_moved_at)
        assert snapshots.movements.moved_vms == ({KEY, other} if first else set())
    assert times == [None, START + 10, START + 20, None, START + 40]


of_two_vcpus = st.lists(st.sampled_from([1, 2, 3, 3, 3, 0, -2]), min_size=2, max_size=2)
of_a_vm = st.tuples(of_two_vcpus, st.sampled_from(["each"] * 9 + ["sum", "in part", "both", "away"]))


@given(st.lists(st.tuples(of_a_vm, of_a_vm, st.booleans()), max_size=14))
def test_a_host_on_which_all_grow_is_counted_at_once_as_it_is_one_by_one(
    steps: list[tuple[tuple[list[int], str], tuple[list[int], str], bool]],
) -> None:
    """One tracker is told that nothing but numbers has changed, and the other has to look; they are asked at times."""
    at_once, one_by_one = Snapshots(), Snapshots(tells_changes=False)
    keys, values = (KEY, VmKey(101, 8, 9)), [[0, 5], [7, 0]]
    for *vms, is_asked in steps:
        readings = []
        for key, numbers, (growth, way) in zip(keys, values, vms, strict=True):
            numbers[:] = [max(0, number + more) for number, more in zip(numbers, growth, strict=True)]
            by_id = dict(enumerate(numbers))
            ways: dict[str, list[VmReading]] = {
                "each": [read_vm(by_id, key=key)],
                "sum": [read_vm(total=sum(numbers), count=2, key=key)],
                "in part": [read_vm({1: numbers[1]}, count=2, key=key)],
                "both": [read_vm({1: numbers[1]}, total=sum(numbers), count=2, key=key)],
                "away": [],
            }
            readings += ways[way]
        assert at_once.take(*readings) == one_by_one.take(*readings)
        seen, expected = at_once.movements, one_by_one.movements
        assert (seen.moved_vms, seen.all_moved_at) == (expected.moved_vms, expected.all_moved_at)
        assert seen.sums in ([], [sum(reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())) for reading in readings])
        if is_asked:
            assert [*map(seen.last_moves, keys)] == [*map(expected.last_moves, keys)]
            assert [*map(seen.moved_at_once, readings)] == [*map(expected.moved_at_once, readings)]
    assert [*map(at_once.movements.last_moves, keys)] == [*map(one_by_one.movements.last_moves, keys)]


def test_sums_are_of_snapshots_since_which_every_vcpu_has_moved() -> None:
    snapshots = Snapshots()
    sums = []
    for first, second in ((0, 0), (1, 2), (3, 5), (3, 5), (4, 5), (5, 6)):
        snapshots.take(read_vm({0: first, 1: second}), read_vm({0: second}, key=VmKey(101, 8, 9)))
        sums.append(snapshots.movements.sums)
    assert sums == [[], [3, 2], [8, 5], [], [], [11, 6]]
