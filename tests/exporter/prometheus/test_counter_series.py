"""What a rendering that failed half way leaves behind: nothing that the next one would trust."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.prometheus.counter_series import CounterSeries
from exporter.prometheus.exposition import Column
from exporter.prometheus.vm_series import ShownVm, VmSeries
from tests.snapshots import make_reading


def open_vm(pid: int, notify: tuple[int, ...]) -> ShownVm:
    reading = make_reading(notify=notify, pid=pid)
    return reading, VmSeries(reading)


def take(vm: ShownVm, *, lacks: int | None = None) -> tuple[ShownVm, list[Column]]:
    """Takes the columns of a VM, of which one may lack its numbers."""
    reading, lines = vm
    columns = lines.take_columns(reading)
    return vm, [
        (metric, template, () if at == lacks else column) for at, (metric, template, column) in enumerate(columns)
    ]


def read(series: CounterSeries, vms: list[ShownVm]) -> list[list[bytes]]:
    families = series.render_as_before(vms) or series.render_vcpus([take(vm) for vm in vms], is_all=True)
    return [family.chunks for family in families]


@pytest.mark.parametrize("lacks", [0, 1])
def test_counters_of_other_vms_that_could_not_be_rendered_are_not_taken_for_the_last(lacks: int) -> None:
    first, second, moved = open_vm(1, (1, 2)), open_vm(2, (3, 4)), make_reading(notify=(5, 6), pid=1)
    series = CounterSeries()
    read(series, [first])
    with pytest.raises(TypeError):
        series.render_vcpus([take(second), take(first, lacks=lacks)], is_all=True)
    again = (moved, first[1])
    assert read(series, [again]) == read(CounterSeries(), [again])


def test_sums_of_other_vms_that_could_not_be_rendered_are_not_taken_for_the_last() -> None:
    first, second = open_vm(1, (1, 2)), open_vm(2, (3, 4))
    series = CounterSeries()
    sums = [(vm, vm[1].take_sum(vm[0])) for vm in (first, second)]
    series.render_sums(sums)
    metric, template, _ = sums[0][1] or pytest.fail()
    with pytest.raises(TypeError):
        series.render_sums([sums[1], (first, (metric, template, ()))])
    assert series.render_sums_as_before([second, first]) == []
    assert [family.chunks for family in series.render_sums(sums)] == [
        [b'kvm_vm_notify_window_exits_total{vm="uuid-1"} 3\nkvm_vm_notify_window_exits_total{vm="uuid-2"} 7\n']
    ]
    (family,) = series.render_sums_as_before([(make_reading(notify=(5, 6), pid=1), first[1]), second])
    assert family.chunks[0].endswith(b'{vm="uuid-1"} 11\nkvm_vm_notify_window_exits_total{vm="uuid-2"} 7\n')


def test_a_vm_without_a_vcpu_has_no_sum_unless_that_was_read() -> None:
    none = make_reading(notify=())
    unread = replace(none, counters=none.counters._replace(per_vcpu={}))
    lines = VmSeries(none)
    series = CounterSeries()
    series.render_sums([((none, lines), lines.take_sum(none))])
    assert series.render_sums_as_before([(none, lines)]) != []
    assert series.render_sums_as_before([(unread, lines)]) == []
