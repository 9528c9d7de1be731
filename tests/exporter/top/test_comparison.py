"""Rates between two snapshots: exact where both know, and never 0 where one does not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from exporter.top.comparison import EXITS_KEY, NOTIFY_KEY, Comparison, Subject
from kvm.model import VmReading
from tests.exporter.top.scene import SPLIT, compare, make_summed, make_vm
from tests.snapshots import make_snapshot, make_unread

BEFORE, NOW = make_vm(), make_vm(notify=(7, 0), halts=(10, 30), blocked=(500_000_000, 10**9), flushes=6)


def test_a_rate_is_per_second_and_in_units() -> None:
    both = compare([BEFORE], [NOW])
    rates = {key: both.find_rate(Subject(NOW), key) for key in both.statistics}
    assert rates == {
        NOTIFY_KEY: 2.0,
        EXITS_KEY: 2.0,
        "vcpu/halt_exits": 5.0,
        "vcpu/blocking_ns": 0.75,
        "vcpu/guest_mode": None,
        "vm/remote_tlb_flush": 0.5,
        "vm/pages_4k": None,
    }
    assert [both.find_rate(Subject(NOW, position), "vcpu/blocking_ns") for position in (0, 1)] == [0.25, 0.5]
    assert [both.find_rate(Subject(NOW, position), NOTIFY_KEY) for position in (0, 1)] == [2.0, 0.0]


def test_values_are_summed_where_that_makes_sense() -> None:
    both = compare([BEFORE], [NOW])
    assert both.find_value(Subject(NOW), "vcpu/halt_exits") == 40
    assert both.find_value(Subject(NOW, 1), "vcpu/guest_mode") == 1
    assert both.find_value(Subject(NOW), "vcpu/guest_mode") is None
    assert both.find_value(Subject(NOW), "vm/pages_4k") == both.find_amount(Subject(NOW), "vm/pages_4k") == 77
    assert both.find_value(Subject(NOW, 0), "vm/pages_4k") is None, "a vCPU has none of its VM's"


def test_sums_of_the_source_are_compared_too() -> None:
    now = make_summed(notify=5, halts=40)
    both = compare([make_summed()], [now])
    assert (both.find_rate(Subject(now), NOTIFY_KEY), both.find_rate(Subject(now), "vcpu/halt_exits")) == (2.0, 5.0)
    assert both.find_value(Subject(now), "vcpu/halt_exits") == 40


def is_unknown(both: Comparison, reading: VmReading, key: str = NOTIFY_KEY) -> bool:
    return both.find_rate(Subject(reading), key) is None


def test_what_is_not_known_is_no_zero() -> None:
    assert is_unknown(Comparison(make_snapshot(NOW)), NOW), "one snapshot"
    assert is_unknown(Comparison(make_snapshot(NOW), make_snapshot(NOW)), NOW), "no time between the two"
    assert is_unknown(compare([make_vm(pid=9)], [NOW]), NOW), "another VM"
    assert is_unknown(compare([NOW], [BEFORE]), BEFORE), "a counter fell"
    assert is_unknown(compare([replace(BEFORE, source="bpf")], [NOW]), NOW), "another source"
    plugged = make_vm(notify=(7, 0, 0), halts=(1, 1, 1), blocked=(0, 0, 0))
    assert is_unknown(compare([BEFORE], [plugged]), plugged), "another vCPU"
    unread = make_unread()
    assert is_unknown(compare([unread], [unread]), unread)
    assert compare([unread], [unread]).find_value(Subject(unread), NOTIFY_KEY) is None


def test_a_vm_that_was_read_in_part_has_no_sum() -> None:
    before, now = replace(BEFORE, vcpu_count=3), replace(NOW, vcpu_count=3)
    both = compare([before], [now])
    assert both.find_value(Subject(now), NOTIFY_KEY) is None
    assert is_unknown(both, now)
    assert both.find_rate(Subject(now, 0), NOTIFY_KEY) == 2.0


def test_a_vcpu_whose_counter_fell_has_no_rate_and_the_others_have() -> None:
    now = make_vm(notify=(1, 4))
    both = compare([BEFORE], [now])
    assert is_unknown(both, now)
    assert [both.find_rate(Subject(now, position), NOTIFY_KEY) for position in (0, 1)] == [None, 2.0]


def test_statistics_that_were_not_read_are_not_known() -> None:
    now = replace(NOW, counters=NOW.counters._replace(statistics=None))
    both = compare([BEFORE], [NOW, now])
    assert both.find_value(Subject(now), "vcpu/halt_exits") is None
    assert is_unknown(both, now, "vcpu/halt_exits")
    assert both.find_rate(Subject(now), NOTIFY_KEY) == 2.0, "the counters were"


def test_a_histogram_is_no_column() -> None:
    assert any(descriptor.is_histogram for descriptor in SPLIT.vcpu)
    assert "vcpu/halt_wait_hist" not in compare([BEFORE], [NOW]).statistics


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=6))
def test_the_rate_of_a_vm_is_the_sum_of_its_vcpus_or_unknown(pairs: list[tuple[int, int]]) -> None:
    zeros = (0,) * len(pairs)
    then, now = ([pair[index] for pair in pairs] for index in (0, 1))
    before = make_vm(notify=tuple(then), halts=zeros, blocked=zeros)
    after = make_vm(notify=tuple(now), halts=zeros, blocked=zeros)
    both = compare([before], [after], 1.0)
    rates = [both.find_rate(Subject(after, position), NOTIFY_KEY) for position in range(len(pairs))]
    whole = both.find_rate(Subject(after), NOTIFY_KEY)
    if any(later < earlier for earlier, later in pairs):
        assert whole is None
        assert None in rates
    else:
        assert whole == float(sum(now) - sum(then))
        assert rates == [float(later - earlier) for earlier, later in pairs]
