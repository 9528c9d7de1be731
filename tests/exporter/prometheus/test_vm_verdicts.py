"""The kept columns of one VM's vCPUs are those that would be made anew, and nothing half done is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.monitor.figure_columns import build_vm_figures
from exporter.prometheus import metrics
from exporter.prometheus.exposition import Column
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vm_verdicts import Known, VmVerdicts
from exporter.stalls.verdicts import State, VcpuFigures, VmFigures
from kvm.model import Vcpu

IDS = (0, 2, 4)
VCPUS = [Vcpu(index, vcpu_id, 5000 + index) for index, vcpu_id in enumerate(IDS)]
KNOWN = Known(
    traced=True, judged=True, notified=range(3), missed=(), drilled=(), starts={}, invalid=None, is_alone=True
)
DRILLED = KNOWN._replace(drilled={0})
KINDS = [
    KNOWN,
    DRILLED,
    KNOWN._replace(notified=[0, 1]),
    KNOWN._replace(traced=False),
    KNOWN._replace(judged=False, starts={0: 90.5}),
    KNOWN._replace(invalid={(5001, 2): 3}, missed=(0,)),
    KNOWN._replace(starts={4: 90.5}),
]


def make_template(metric: Metric, places: Sequence[int]) -> bytes:
    return b"".join(b"%b %d %%a\n" % (metric.name.encode(), at) for at in places)


def make_figures(traced: int, state: State = State.PROGRESSING, *, can_judge: bool = True) -> VcpuFigures:
    return VcpuFigures(state, None, traced, 0, can_judge=can_judge)


def read(columns: list[Column]) -> dict[Metric, dict[int, str]]:
    """By metric and place, the values."""
    assert len({metric for metric, _, _ in columns}) == len(columns)
    found = {}
    for metric, template, values in columns:
        lines = [line.split() for line in (template % values).decode().splitlines()]
        assert lines
        found[metric] = {int(at): value for _, at, value in lines}
    return found


def find_traced(columns: list[Column]) -> dict[int, str]:
    return read(columns)[metrics.VCPU_TRACED_EXITS]


def test_each_vcpu_has_its_own_figures() -> None:
    verdicts = VmVerdicts(VCPUS, make_template)
    first = build_vm_figures({vcpu_id: make_figures(7 + at) for at, vcpu_id in enumerate(IDS)})
    taken = verdicts.take_columns(KNOWN, first)
    assert find_traced(taken) == {0: "7", 1: "8", 2: "9"}
    assert verdicts.take_columns(KNOWN, first) is taken
    unplugged = build_vm_figures({4: make_figures(1), 7: make_figures(2)})
    assert find_traced(verdicts.take_columns(KNOWN, unplugged)) == {2: "1"}


def test_while_only_counts_change_the_monitors_own_columns_are_taken() -> None:
    made = []

    def note(metric: Metric, places: Sequence[int]) -> bytes:
        made.append(metric)
        return make_template(metric, places)

    verdicts = VmVerdicts(VCPUS, note)
    first, second = (build_vm_figures({vcpu_id: make_figures(traced) for vcpu_id in IDS}) for traced in (1, 2))
    before = {metric: values for metric, _, values in verdicts.take_columns(KNOWN, first)}
    made.clear()
    now = {metric: values for metric, _, values in verdicts.take_columns(KNOWN, second)}
    assert made == []
    assert now[metrics.VCPU_TRACED_EXITS] is second.traced_exits
    assert now[metrics.VCPU_NO_PROGRESS] is before[metrics.VCPU_NO_PROGRESS]


def test_what_is_not_told_needs_no_lines() -> None:
    """Else a VM whose lines cannot be made would count as malformed in each scrape, though it has none."""

    def refuse(_metric: Metric, _places: Sequence[int]) -> bytes:
        raise AssertionError

    figures = build_vm_figures({vcpu_id: make_figures(1) for vcpu_id in IDS})
    known = KNOWN._replace(traced=False, judged=False)
    assert VmVerdicts(VCPUS, refuse).take_columns(known, figures) == []


def test_one_that_nobody_tracks_is_not_stuck_if_its_thread_is_known() -> None:
    vcpus = [*VCPUS[:2], Vcpu(2, 4, None)]
    stuck = read(VmVerdicts(vcpus, make_template).take_columns(KNOWN, build_vm_figures({0: make_figures(1)})))
    assert stuck[metrics.VCPU_NO_PROGRESS] == {0: "0", 1: "0"}


@pytest.mark.parametrize("can_judge", [True, False])
@pytest.mark.parametrize("state", State)
def test_who_is_stuck_is_told_of_those_that_can_be_judged(state: State, can_judge: bool) -> None:
    figures = build_vm_figures({0: make_figures(1, state, can_judge=can_judge)})
    found = read(VmVerdicts(VCPUS[:1], make_template).take_columns(KNOWN._replace(notified=[0]), figures))
    stuck = {State.STALLED: {0: "1"}, State.UNKNOWN: None, State.CONTEXT_LOST: None}
    assert found.get(metrics.VCPU_NO_PROGRESS) == stuck.get(state, {0: "0"} if can_judge else None)


STEPS = st.tuples(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from([*IDS, 1, 7]),
        st.builds(make_figures, st.integers(0, 1), st.sampled_from(State), can_judge=st.booleans()),
    ),
)


@given(st.lists(STEPS, max_size=6))
def test_whatever_comes_and_goes_the_columns_are_those_of_one_made_anew(
    steps: list[tuple[Known, dict[int, VcpuFigures]]],
) -> None:
    """Also where something is known of a vCPU that the snapshot lacks, as of one that was unplugged."""
    kept, figures = VmVerdicts(VCPUS, make_template), VmFigures()
    for known, vcpus in steps:
        now = build_vm_figures(vcpus)
        figures = figures if figures == now else now
        anew = VmVerdicts(VCPUS, make_template).take_columns(known, figures)
        assert read(kept.take_columns(known, figures)) == read(anew)


@pytest.mark.parametrize("vcpus", [VCPUS, []])
def test_a_metric_of_which_nothing_is_told_has_no_lines(vcpus: list[Vcpu]) -> None:
    known = KNOWN._replace(judged=False, notified=range(len(vcpus)))
    assert VmVerdicts(vcpus, make_template).take_columns(known, VmFigures()) == []


class FailingTemplates:
    """Makes templates until so many are made; None: all are."""

    left: int | None = None

    def make(self, metric: Metric, places: Sequence[int]) -> bytes:
        if self.left == 0:
            raise MemoryError
        self.left = None if self.left is None else self.left - 1
        return make_template(metric, places)


@pytest.mark.parametrize("made", range(3))
@pytest.mark.parametrize("next_known", [KNOWN, DRILLED], ids=["as before", "drilled"])
@pytest.mark.parametrize("next_figures", range(2), ids=["as before", "others"])
def test_of_what_failed_half_way_nothing_is_left(made: int, next_known: Known, next_figures: int) -> None:
    templates, figures = (
        FailingTemplates(),
        [build_vm_figures({0: make_figures(1)}), build_vm_figures({2: make_figures(2)})],
    )
    verdicts = VmVerdicts(VCPUS, templates.make)
    verdicts.take_columns(KNOWN, figures[0])
    templates.left = made
    with pytest.raises(MemoryError):
        verdicts.take_columns(DRILLED, figures[1])
    templates.left = None
    made_anew: Any = read(VmVerdicts(VCPUS, make_template).take_columns(next_known, figures[next_figures]))
    assert read(verdicts.take_columns(next_known, figures[next_figures])) == made_anew != {}
