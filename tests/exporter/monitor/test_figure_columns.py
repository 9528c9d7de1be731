"""The figures of a VM in columns are those that were put last, whatever came and went."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exporter.monitor.figure_columns import FigureColumns
from exporter.stalls.verdicts import State, VcpuFigures, VmFigures

VCPU_IDS = st.integers(0, 5)
FIGURES = st.builds(
    VcpuFigures,
    st.sampled_from(State),
    st.sampled_from([None, 90.0]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)


@given(st.lists(st.tuples(VCPU_IDS, st.none() | FIGURES)))
def test_columns_are_those_of_the_figures_put_last(steps: list[tuple[int, VcpuFigures | None]]) -> None:
    columns, figures = FigureColumns(), dict[int, VcpuFigures]()
    for vcpu_id, given_figures in steps:
        if given_figures is None:
            columns.drop(vcpu_id)
            figures.pop(vcpu_id, None)
        else:
            columns.put(vcpu_id, given_figures)
            figures[vcpu_id] = given_figures
    found = columns.find()
    assert found.vcpu_ids == tuple(sorted(figures))
    assert found.vcpus == figures
    assert found.states == tuple(figures[vcpu_id].state for vcpu_id in found.vcpu_ids)
    assert found.stalled == sum(of.state is State.STALLED for of in figures.values())


def test_what_was_found_does_not_change() -> None:
    columns, figures = FigureColumns(), VcpuFigures(State.QUIET, None, 0, 0, can_judge=True)
    columns.put(3, figures)
    before = columns.find()
    columns.put(3, figures._replace(traced_exits=7))
    columns.put(1, figures)
    assert (before.vcpu_ids, before.traced_exits) == ((3,), (0,))
    assert columns.find().traced_exits == (0, 7)


def test_a_column_of_which_nothing_has_changed_is_the_same_object() -> None:
    columns, figures = FigureColumns(), VcpuFigures(State.PROGRESSING, None, 0, 0, can_judge=True)
    for vcpu_id in (0, 1):
        columns.put(vcpu_id, figures)
    before = columns.find()
    columns.put(1, figures._replace(traced_exits=7))
    now = columns.find()
    others = [name for name in VmFigures._fields if getattr(now, name) is not getattr(before, name)]
    assert others == ["traced_exits"]
