"""The kept lines about one VM's vCPUs: looked at are those that have changed, and nothing half done is kept."""

from __future__ import annotations

from typing import Never

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.prometheus import metrics
from exporter.prometheus.grouped_lines import Rendered
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vcpu_lines import VcpuLines
from exporter.prometheus.vm_verdicts import Known, VmVerdicts
from exporter.stalls.verdicts import FIGURES_BLOCK, State, VcpuFigures, VmFigures, build_vm_figures
from kvm.model import Vcpu
from tests.reports import follow

# The last is in another block of figures than the others.
IDS = (0, 2, FIGURES_BLOCK)
VCPUS = [Vcpu(index, vcpu_id, 5000 + index) for index, vcpu_id in enumerate(IDS)]
KNOWN = Known(
    traced=True, judged=True, notified=range(3), missed=(), drilled=(), starts={}, invalid=None, is_alone=True
)
DRILLED = KNOWN._replace(drilled={0})
SOME_IDS = (*IDS, 1, FIGURES_BLOCK + 1, 2 * FIGURES_BLOCK)
NO_FIGURES = VmFigures({}, 0)
LABELS = [b'{vcpu="%d"}' % vcpu.index for vcpu in VCPUS]


def open_lines(metric: Metric) -> VcpuLines:
    return VcpuLines(metric, LABELS)


def make_figures(traced: int) -> VcpuFigures:
    return VcpuFigures(State.PROGRESSING, None, traced, 0, can_judge=True)


def find_traced(rendered: Rendered) -> list[str]:
    (text,) = rendered[metrics.VCPU_TRACED_EXITS]
    return [line.split()[-1] for line in text.decode().splitlines()]


def test_only_vcpus_that_have_changed_are_looked_at() -> None:
    puts: list[int] = []

    class NotedLines(VcpuLines):
        def put(self, at: int, value: float | None) -> None:
            puts.append(at)
            super().put(at, value)

    verdicts = VmVerdicts(VCPUS, lambda metric: NotedLines(metric, LABELS))
    first = build_vm_figures({vcpu_id: make_figures(at) for at, vcpu_id in enumerate(IDS)})
    rendered = verdicts.render(KNOWN, first)
    assert find_traced(rendered) == ["0", "1", "2"]
    assert verdicts.render(KNOWN, first) is rendered
    assert set(puts) == {0, 1, 2}
    puts.clear()
    second = follow(build_vm_figures({**first.vcpus, 2: make_figures(9)}), first)
    assert find_traced(verdicts.render(KNOWN, second)) == ["0", "9", "2"]
    assert set(puts) == {1}


class NotLookedInto(dict[int, VcpuFigures]):
    """A block of figures of which no vCPU is asked for."""

    def get(self, *_arguments: object) -> Never:
        raise AssertionError


def test_a_block_that_is_the_same_object_is_not_looked_into() -> None:
    verdicts = VmVerdicts(VCPUS, open_lines)
    same = NotLookedInto({FIGURES_BLOCK: make_figures(5)})
    verdicts.render(KNOWN, VmFigures({0: {0: make_figures(1)}, 1: same}, 0))
    assert find_traced(verdicts.render(KNOWN, VmFigures({0: {0: make_figures(2)}, 1: same}, 0))) == ["2", "5"]


@given(st.lists(st.dictionaries(st.sampled_from(SOME_IDS), st.integers(0, 1)), max_size=6))
def test_whatever_comes_and_goes_the_lines_are_those_of_one_made_anew(steps: list[dict[int, int]]) -> None:
    """Also where something is known of a vCPU that the snapshot lacks, as of one that was unplugged."""
    known = KNOWN._replace(notified=[0, 1])
    kept, figures = VmVerdicts(VCPUS, open_lines), NO_FIGURES
    for step in steps:
        now = build_vm_figures({vcpu_id: make_figures(traced) for vcpu_id, traced in step.items()})
        figures = follow(now, figures)
        anew = VmVerdicts(VCPUS, open_lines).render(known, figures)
        assert kept.render(known, figures) == anew


def test_a_metric_of_which_nothing_is_told_has_no_lines() -> None:
    opened = []

    def note(metric: Metric) -> VcpuLines:
        opened.append(metric)
        return open_lines(metric)

    assert VmVerdicts(VCPUS, note).render(KNOWN._replace(judged=False), NO_FIGURES) == {}
    assert opened == []


class FailingLines(VcpuLines):
    """Lines whose making, or whose putting together, fails once some have worked; None: all work."""

    lines_left: int | None = None
    renders_left: int | None = None

    def _render(self, at: int, value: float) -> bytes:
        FailingLines.lines_left = use_up(FailingLines.lines_left)
        return super()._render(at, value)

    def render(self) -> list[bytes]:
        FailingLines.renders_left = use_up(FailingLines.renders_left)
        return super().render()


def use_up(left: int | None) -> int | None:
    if left == 0:
        raise MemoryError
    return None if left is None else left - 1


@pytest.mark.parametrize(("lines_left", "renders_left"), [(0, None), (1, None), (None, 0)])
@pytest.mark.parametrize("next_known", [KNOWN, DRILLED], ids=["as before", "drilled"])
def test_of_what_failed_half_way_nothing_is_left(
    lines_left: int | None, renders_left: int | None, next_known: Known
) -> None:
    verdicts = VmVerdicts(VCPUS, lambda metric: FailingLines(metric, LABELS))
    verdicts.render(KNOWN, build_vm_figures({0: make_figures(1)}))
    figures = build_vm_figures({0: make_figures(2)})
    FailingLines.lines_left, FailingLines.renders_left = lines_left, renders_left
    try:
        with pytest.raises(MemoryError):
            verdicts.render(DRILLED, figures)
    finally:
        FailingLines.lines_left = FailingLines.renders_left = None
    made_anew = VmVerdicts(VCPUS, open_lines).render(next_known, figures)
    assert verdicts.render(next_known, figures) == made_anew != {}
