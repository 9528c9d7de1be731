"""Lines about vCPUs that are kept from scrape to scrape are those that would be made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.prometheus.grouped_lines import Rendered
from exporter.prometheus.kept_verdicts import KeptVerdicts
from exporter.prometheus.metrics import Metric
from exporter.prometheus.stall_series import StallSeries
from exporter.prometheus.vm_series import ShownVm, VmSeries
from exporter.stalls.verdicts import MonitorReport, State, VcpuFigures, VmFigures, build_vm_figures
from kvm.model import NOTIFY_WINDOW_EXITS, VcpuKey, VmKey, VmReading
from tests.reports import make_report
from tests.snapshots import make_reading

VMS = 3
READINGS = [make_reading(f"vm-{number}", (1, 1), pid=100 + number) for number in range(VMS)]
FIRST = READINGS[0].vm.key


def make_figures(state: State, traced: int) -> VmFigures:
    found = VcpuFigures(state, 90.0 if state is State.STALLED else None, traced, 0, can_judge=True)
    return build_vm_figures({0: found})


# The same objects again and again, as the monitor gives them while nothing new is found out.
FIGURES = [make_figures(State.PROGRESSING, 3), make_figures(State.PROGRESSING, 4), make_figures(State.STALLED, 5)]


@dataclass(frozen=True)
class Scrape:
    """What a scrape finds: of each VM its figures and counters, and of the host."""

    figures: list[VmFigures | None]
    counters: list[tuple[int, ...]]
    report: MonitorReport
    unix_offset: float = 0.0
    with_counters: bool = True


DRILL = replace(make_report(State.STALLED, vm=READINGS[0].vm, drill=True), vcpu=READINGS[0].vcpus[0])
REPORTS = [
    MonitorReport(),
    MonitorReport(problem="no CAP_PERFMON"),
    MonitorReport(context_invalid={}),
    MonitorReport(context_invalid={(100, 77, 5000, 0): 2}),
    MonitorReport(context_invalid={}, missed_vcpus=frozenset({VcpuKey(FIRST, 0)})),
    MonitorReport(vcpus=(DRILL,)),
]
SCRAPES = st.builds(
    Scrape,
    st.lists(st.sampled_from([*FIGURES, None]), min_size=VMS, max_size=VMS),
    st.lists(st.sampled_from([(1, 1), (2, 2), (0, 3), (1,)]), min_size=VMS, max_size=VMS),
    st.sampled_from(REPORTS),
    st.sampled_from([0.0, 7.0]),
)


def give(scrape: Scrape) -> tuple[StallSeries, list[VmReading]]:
    figures = {
        reading.vm.key: found for reading, found in zip(READINGS, scrape.figures, strict=True) if found is not None
    }
    readings = [
        replace(reading, counters=reading.counters._replace(per_vcpu={NOTIFY_WINDOW_EXITS: column}))
        for reading, column in zip(READINGS, scrape.counters, strict=True)
    ]
    report = replace(scrape.report, figures=figures)
    return StallSeries(report, readings, scrape.unix_offset, with_counters=scrape.with_counters), readings


class Asker:
    """Asks VMs but for those that make no sense, which are silent; ``asked`` counts."""

    def __init__(self, *silent: VmKey) -> None:
        self.silent = silent
        self.asked = 0

    def ask(
        self, vms: Iterable[ShownVm], ask: Callable[[VmSeries, VmReading], Rendered]
    ) -> Iterator[tuple[ShownVm, Rendered]]:
        for reading, lines in vms:
            self.asked += 1
            if reading.vm.key not in self.silent:
                yield (reading, lines), ask(lines, reading)


def render(kept: KeptVerdicts, asker: Asker, scrape: Scrape, lines: list[VmSeries]) -> dict[Metric, bytes]:
    series, readings = give(scrape)
    families = kept.render(series, list(zip(readings, lines, strict=True)), asker.ask)
    return {family.metric: b"".join(family.chunks) for family in families}


def open_lines() -> list[VmSeries]:
    return [VmSeries(reading) for reading in READINGS]


@given(st.lists(SCRAPES, min_size=2, max_size=6), st.sampled_from([(), (FIRST,)]))
def test_whatever_comes_the_lines_are_those_made_anew(scrapes: list[Scrape], silent: tuple[VmKey, ...]) -> None:
    kept, lines, asker = KeptVerdicts(), open_lines(), Asker(*silent)
    for scrape in scrapes:
        assert render(kept, asker, scrape, lines) == render(KeptVerdicts(), asker, scrape, open_lines())


@pytest.mark.parametrize("with_counters", [False, True])
@pytest.mark.parametrize("figures", FIGURES)
@pytest.mark.parametrize(("before", "after"), [*product(range(len(REPORTS)), repeat=2)])
def test_what_is_known_of_the_host_changes_lines_of_vms_of_which_nothing_is_new(
    before: int, after: int, figures: VmFigures, with_counters: bool
) -> None:
    kept, lines = KeptVerdicts(), open_lines()
    first = Scrape([figures] * VMS, [(1, 1)] * VMS, REPORTS[before], with_counters=with_counters)
    render(kept, Asker(), first, lines)
    second = replace(first, report=REPORTS[after], unix_offset=7.0)
    assert render(kept, Asker(), second, lines) == render(KeptVerdicts(), Asker(), second, open_lines())


def test_as_many_vms_need_not_be_the_same_ones() -> None:
    kept, lines, asker = KeptVerdicts(), open_lines(), Asker()
    series, readings = give(Scrape([FIGURES[0]] * VMS, [(1, 1)] * VMS, REPORTS[0]))
    vms = list(zip(readings, lines, strict=True))
    kept.render(series, vms[:2], asker.ask)
    found, fresh = (each.render(series, vms[1:], asker.ask) for each in (kept, KeptVerdicts()))
    assert [family.chunks for family in found] == [family.chunks for family in fresh]


def test_in_a_flood_only_vms_with_news_are_asked() -> None:
    kept, lines, asker = KeptVerdicts(), open_lines(), Asker()
    before = Scrape([FIGURES[0]] * VMS, [(1, 1)] * VMS, REPORTS[0])
    render(kept, asker, before, lines)
    assert asker.asked == VMS
    moved = replace(before, counters=[(2, 2)] * VMS)
    render(kept, asker, moved, lines)
    assert asker.asked == VMS
    render(kept, asker, replace(moved, figures=[FIGURES[0], FIGURES[1], FIGURES[0]]), lines)
    assert asker.asked == VMS + 1


def test_a_vm_of_which_more_is_known_is_asked_each_time_and_costs_no_other() -> None:
    kept, lines, asker = KeptVerdicts(), open_lines(), Asker()
    missed = MonitorReport(missed_vcpus=frozenset({VcpuKey(FIRST, 0)}), context_invalid={(101, 77, 5000, 0): 2})
    scrape = Scrape([FIGURES[0]] * VMS, [(1, 1)] * VMS, missed)
    render(kept, asker, scrape, lines)
    render(kept, asker, scrape, lines)
    assert asker.asked == VMS + 2


def test_a_vm_that_did_not_answer_is_asked_again() -> None:
    kept, lines, asker = KeptVerdicts(), open_lines(), Asker(FIRST)
    scrape = Scrape([FIGURES[0]] * VMS, [(1, 1)] * VMS, REPORTS[0])
    without = render(kept, asker, scrape, lines)
    asker.silent = ()
    again = render(kept, asker, scrape, lines)
    assert asker.asked == VMS + 1
    assert all(len(again[metric]) > len(text) for metric, text in without.items())


class Incomparable(bytes):
    """Cannot be compared with what was there before."""

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        raise MemoryError


class Spoiler(Asker):
    """Gives lines that fail half way when they are put with the others."""

    def ask(
        self, vms: Iterable[ShownVm], ask: Callable[[VmSeries, VmReading], Rendered]
    ) -> Iterator[tuple[ShownVm, Rendered]]:
        for shown, rendered in super().ask(vms, ask):
            *first, last = rendered
            yield shown, {**{metric: [b"spoiled\n"] for metric in first}, last: [Incomparable(rendered[last][0])]}


def test_what_is_as_it_was_before_a_fault_has_the_lines_from_before() -> None:
    kept, lines = KeptVerdicts(), open_lines()
    before = Scrape([FIGURES[0]] * VMS, [(1, 1)] * VMS, REPORTS[0])
    wanted = render(kept, Asker(), before, lines)
    with pytest.raises(MemoryError):
        render(kept, Spoiler(), replace(before, figures=[FIGURES[1]] * VMS), lines)
    assert render(kept, Asker(), before, lines) == wanted
