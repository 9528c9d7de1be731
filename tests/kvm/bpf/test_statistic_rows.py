"""Rows and columns of statistics are cut by VM, and what has not moved is the same object."""

from __future__ import annotations

import struct
from operator import itemgetter

import pytest

from kvm.bpf.statistic_rows import StatisticCutter, VmPlace
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatTable, VmStatistics

VM, VCPU = StatScope.VM, StatScope.VCPU
OWN = (StatDescriptor(VM, "own", StatKind.INSTANT),)
OF_VCPU = (
    StatDescriptor(VCPU, "exits", StatKind.CUMULATIVE),
    StatDescriptor(VCPU, "h", StatKind.LOG_HISTOGRAM, size=2),
)
SUMMED, SPLIT = StatTable(VM, OWN, OF_VCPU), StatTable(VCPU, OWN, OF_VCPU)


def pack(*rows: tuple[int, ...]) -> bytes:
    return b"".join(struct.pack(f"={len(row)}Q", *row) for row in rows)


def test_a_row_is_a_vms_own_values_and_then_the_sums() -> None:
    cutter = StatisticCutter(SUMMED)
    cutter.place([VmPlace(1, slice(0, 2), None, True), VmPlace(0, slice(2, 3), None, False)], [None, None])
    assert cutter.cut(pack((1, 2, 3, 4), (5, 6, 7, 8)), ()) == [
        VmStatistics(SUMMED, (5,), (6, 7, 8)),
        VmStatistics(SUMMED, (1,), None),
    ], "of a VM of which a vCPU is missing there is no sum"


def test_columns_are_cut_and_sorted() -> None:
    cutter = StatisticCutter(SPLIT)
    places = [VmPlace(0, slice(0, 2), itemgetter(1, 0), True), VmPlace(1, slice(2, 3), None, True)]
    cutter.place(places, [None, None])
    made = cutter.cut(pack((9,), (8,)), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    assert made == [
        VmStatistics(SPLIT, (9,), None, ((2, 1), (5, 4), (8, 7))),
        VmStatistics(SPLIT, (8,), None, ((3,), (6,), (9,))),
    ]


def test_vms_that_were_read_otherwise_have_none() -> None:
    for table in (SUMMED, SPLIT):
        cutter = StatisticCutter(table)
        cutter.place([VmPlace(1, slice(3, 5), None, True)], [None])
        assert cutter.cut(pack((1, 2, 3, 4)) if table is SUMMED else pack((1,)), ((1,), (2,), (3,))) == [None]


def test_what_has_not_moved_is_the_same_object() -> None:
    cutter = StatisticCutter(SUMMED)
    places = [VmPlace(number, slice(0, 1), None, True) for number in range(2)]
    cutter.place(places, [None, None])
    first = cutter.cut(pack((1, 2, 3, 4), (5, 6, 7, 8)), ())
    assert cutter.cut(pack((1, 2, 3, 4), (5, 6, 7, 8)), ()) is first
    second = cutter.cut(pack((1, 2, 3, 4), (5, 6, 7, 9)), ())
    assert second[0] is first[0]
    assert second[1] == VmStatistics(SUMMED, (5,), (6, 7, 9))


@pytest.mark.parametrize("table", [SUMMED, SPLIT])
def test_what_has_not_moved_is_the_same_object_also_where_another_vm_has_come(table: StatTable) -> None:
    cutter = StatisticCutter(table)
    row, columns = (1, 2, 3, 4) if table is SUMMED else (1,), () if table is SUMMED else ((2, 3), (3, 4), (4, 5))
    cutter.place([VmPlace(0, slice(0, 1), None, True)], [None])
    (first,) = cutter.cut(pack(row), columns)
    places = [VmPlace(number, slice(number, number + 1), None, True) for number in range(2)]
    cutter.place(places, [first, None])
    assert cutter.cut(pack(row, row), columns)[0] is first


def test_a_vm_that_is_complete_again_has_its_sums_back() -> None:
    cutter = StatisticCutter(SUMMED)
    cutter.place([VmPlace(0, slice(0, 1), None, False)], [None])
    (partly,) = cutter.cut(pack((1, 2, 3, 4)), ())
    cutter.place([VmPlace(0, slice(0, 1), None, True)], [partly])
    assert cutter.cut(pack((1, 2, 3, 4)), ()) == [VmStatistics(SUMMED, (1,), (2, 3, 4))]
