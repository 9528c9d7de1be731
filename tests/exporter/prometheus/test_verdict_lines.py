"""In a flood no VM is asked anew what the monitor has found; whatever else changes has them asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import pytest

from exporter.monitor.figure_columns import FigureColumns
from exporter.prometheus.stall_series import StallSeries
from exporter.prometheus.verdict_lines import VerdictLines
from exporter.prometheus.vm_series import ShownVm, VmSeries
from exporter.stalls.verdicts import MonitorReport, State, VcpuFigures
from kvm.model import VcpuKey, VmReading
from tests.reports import make_report
from tests.snapshots import make_reading

OFFSET = 1.7e9
NOTIFYING = VcpuFigures(State.NOTIFYING, None, 0, 0, can_judge=True)
T = TypeVar("T")


class Flood:
    """Two VMs of two vCPUs, all of which take notify exits; the second VM is stuck in part if so wished."""

    def __init__(self) -> None:
        self.vms: list[ShownVm] = [
            (vm, VmSeries(vm)) for vm in (make_reading(pid=pid, notify=(3, 4)) for pid in (1, 2))
        ]
        self.columns = {reading.vm.key: FigureColumns() for reading, _ in self.vms}
        self.report = MonitorReport(context_invalid={})
        self.lines = VerdictLines()
        self.others: list[VmReading] = []
        """VMs that have no series."""
        self.with_counters = True
        self.asked = 0
        self.fails = False
        self.nonsense = 0
        """How many VMs make no sense."""
        for number in range(4):
            self.put(number, NOTIFYING)

    def put(self, number: int, figures: VcpuFigures) -> None:
        """Tell of one of the vCPUs."""
        reading, _ = self.vms[number // 2]
        self.columns[reading.vm.key].put(reading.vcpus[number % 2].vcpu_id, figures)

    def trace(self, number: int, exits: int) -> None:
        """Have so many exits of a vCPU traced."""
        self.put(number, NOTIFYING._replace(traced_exits=exits))

    def ask(self, vms: Iterable[ShownVm], ask: Callable[[VmSeries, VmReading], T]) -> list[tuple[ShownVm, T]]:
        """Ask VMs, and count them."""
        if self.fails:
            raise MemoryError
        vms = [*vms][self.nonsense :]
        asked = [((reading, lines), ask(lines, reading)) for reading, lines in vms]
        self.asked += len(asked)
        return asked

    def render(self, lines: VerdictLines | None = None) -> list[str]:
        """Render, in lines that are kept or in new ones."""
        figures = {key: columns.find() for key, columns in self.columns.items()}
        report = replace(self.report, figures={key: of for key, of in figures.items() if of.vcpu_ids})
        readings = [*self.others, *(reading for reading, _ in self.vms)]
        verdicts = StallSeries(report, readings, OFFSET, with_counters=self.with_counters)
        vms = self.vms if lines is None else [(reading, VmSeries(reading)) for reading, _ in self.vms]
        families = (lines or self.lines).render(vms, verdicts, self.ask)
        return sorted(b"".join(chunk for of in families for chunk in of.chunks).decode().splitlines())

    def count_asked(self) -> int:
        """Render, make sure that it is what new lines have, and count the VMs that were asked."""
        self.asked = 0
        kept = self.render()
        asked = self.asked
        assert kept == self.render(VerdictLines())
        return asked


@pytest.fixture
def flood() -> Flood:
    flood = Flood()
    assert flood.count_asked() == 2
    return flood


def test_what_is_new_of_counts_alone_has_nobody_asked(flood: Flood) -> None:
    for number in range(4):
        flood.trace(number, number + 5)
        assert flood.count_asked() == 0
    assert 'kvm_vcpu_notify_traced_exits_total{vcpu="1",vm="uuid-2"} 8' in flood.render()


def test_so_it_is_where_a_vcpu_is_stuck(flood: Flood) -> None:
    flood.put(3, VcpuFigures(State.STALLED, 90.0, 64, 63, can_judge=True))
    assert flood.count_asked() == 2
    flood.put(3, VcpuFigures(State.STALLED, 90.0, 128, 127, can_judge=True))
    assert flood.count_asked() == 0


def test_a_stall_that_has_ended_and_begun_again_has_vms_asked(flood: Flood) -> None:
    for start in (90.0, 91.0):
        flood.put(3, VcpuFigures(State.STALLED, start, 64, 63, can_judge=True))
        assert flood.count_asked() == 2


def test_so_it_is_where_of_some_vms_or_vcpus_nothing_was_found_out(flood: Flood) -> None:
    first, second = (reading for reading, _ in flood.vms)
    flood.columns[first.vm.key].drop(first.vcpus[0].vcpu_id)
    for vcpu in second.vcpus:
        flood.columns[second.vm.key].drop(vcpu.vcpu_id)
    assert flood.count_asked() == 2
    flood.trace(1, 9)
    assert flood.count_asked() == 0


def test_so_it_is_where_nothing_can_be_traced(flood: Flood) -> None:
    flood.report = replace(flood.report, problem="no tracepoint")
    assert flood.count_asked() == 2
    flood.trace(1, 9)
    assert flood.count_asked() == 0


def test_whether_anybody_can_judge_is_told_also_where_counts_are_not(flood: Flood) -> None:
    flood.with_counters = False
    assert flood.count_asked() == 2
    flood.report = replace(flood.report, problem="no tracepoint")
    assert flood.count_asked() == 2
    assert not [line for line in flood.render() if "no_forward_progress" in line]


def test_a_vcpu_that_was_unplugged_has_vms_asked_each_time(flood: Flood) -> None:
    reading, _ = flood.vms[0]
    flood.columns[reading.vm.key].put(99, NOTIFYING)
    assert flood.count_asked() == 2
    flood.trace(1, 9)
    assert flood.count_asked() == 2


def change_state(flood: Flood) -> None:
    flood.put(2, NOTIFYING._replace(state=State.UNKNOWN))


def change_start(flood: Flood) -> None:
    flood.put(2, VcpuFigures(State.STALLED, 95.0, 0, 0, can_judge=True))


def miss_calls(flood: Flood) -> None:
    reading, _ = flood.vms[0]
    flood.report = replace(flood.report, missed_vcpus=frozenset({VcpuKey(reading.vm.key, 0)}))


def lose_context(flood: Flood) -> None:
    reading, _ = flood.vms[0]
    invalid = {(*reading.vm.key[:2], reading.vcpus[0].tid or 0, 0): 3}
    flood.report = replace(flood.report, context_invalid=invalid)


def count_no_more(flood: Flood) -> None:
    flood.report = replace(flood.report, context_invalid=None)


def reset_counters(flood: Flood) -> None:
    reading, lines = flood.vms[1]
    still = make_reading(pid=2, notify=(0, 4))
    flood.vms[1] = still, lines
    assert lines.fits(still), reading


def drill(flood: Flood) -> None:
    reading, _ = flood.vms[0]
    flood.report = replace(flood.report, vcpus=(make_report(vm=reading.vm, vcpu=0, drill=True),))


def tell_no_counts(flood: Flood) -> None:
    flood.with_counters = False


def swap_vms(flood: Flood) -> None:
    flood.vms.reverse()


CHANGES = [
    change_state,
    change_start,
    miss_calls,
    lose_context,
    count_no_more,
    reset_counters,
    drill,
    tell_no_counts,
    swap_vms,
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_changes_has_vms_asked(flood: Flood, change: Callable[[Flood], None]) -> None:
    change(flood)
    flood.trace(0, 7)
    assert flood.count_asked() == 2
    flood.trace(0, 8)
    assert flood.count_asked() == 0


def test_another_vm_of_a_process_has_its_vms_asked_whose_context_was_lost(flood: Flood) -> None:
    """Where a process has several VMs, only threads tell whose exits were counted."""
    reading, _ = flood.vms[0]
    by_another_thread = {(*reading.vm.key[:2], 999, reading.vcpus[0].vcpu_id): 3}
    flood.report = replace(flood.report, context_invalid=by_another_thread)
    flood.count_asked()
    flood.report = replace(flood.report, context_invalid=dict.fromkeys(by_another_thread, 4))
    assert flood.count_asked() == 2
    assert any(line.endswith(" 4") for line in flood.render())
    flood.others = [replace(reading, vm=replace(reading.vm, key=reading.vm.key._replace(vm_fd=10)))]
    assert flood.count_asked() == 2
    assert not any(line.endswith(" 4") for line in flood.render())


def test_what_failed_half_way_is_not_taken_up(flood: Flood) -> None:
    change_state(flood)
    flood.fails = True
    with pytest.raises(MemoryError):
        flood.render()
    flood.fails = False
    flood.put(2, NOTIFYING)
    assert flood.count_asked() == 2


def test_who_made_no_sense_is_asked_again(flood: Flood) -> None:
    change_state(flood)
    flood.nonsense = 1
    flood.render()
    flood.nonsense = 0
    assert flood.count_asked() == 2
