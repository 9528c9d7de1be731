"""Lines that are kept from scrape to scrape are those that would be put together anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.prometheus.exposition import Family
from exporter.prometheus.grouped_lines import GroupedLines, Rendered, group_lines
from exporter.prometheus.metrics import Metric, MetricType

METRICS = [Metric(f"kvm_{name}", MetricType.GAUGE, name) for name in "abc"]

LISTS = st.lists(st.tuples(st.sampled_from(METRICS), st.sampled_from([b"x\n", b"y\n", b"z\n"])), max_size=5)
# What becomes of each VM until the next scrape: nothing, or other lines.
SCRAPES = st.lists(st.lists(st.none() | LISTS, max_size=4), min_size=1, max_size=6)


def read(families: list[Family]) -> dict[Metric, list[bytes]]:
    return {family.metric: list(family.chunks) for family in families}


@given(SCRAPES)
def test_they_are_the_same_as_put_together_anew(scrapes: list[list[Rendered | None]]) -> None:
    lines, before = GroupedLines(), list[Rendered]()
    for scrape in scrapes:
        kept = [*before, *([] for _ in scrape)]
        before = [kept[at] if given is None else given for at, given in enumerate(scrape)]
        assert read(lines.group(before)) == read(group_lines(before))


def test_a_metric_of_which_no_vm_gives_anything_else_is_the_same_family() -> None:
    lines = GroupedLines()
    first: Rendered = [(METRICS[0], b"a 1\n"), (METRICS[1], b"b 1\n")]
    second: Rendered = [(METRICS[0], b"a 2\n"), (METRICS[1], b"b 2\n")]
    before = lines.group([first, second])
    same, changed = lines.group([first, [second[0], (METRICS[1], b"b 3\n")]])
    assert same is before[0]
    assert changed is not before[1]
    assert changed.chunks == [b"b 1\n", b"b 3\n"]


class Incomparable(bytes):
    """Cannot be compared with what was there before."""

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        raise MemoryError


def test_of_what_failed_half_way_nothing_is_left() -> None:
    lines = GroupedLines()
    before: list[Rendered] = [[(METRICS[0], b"a 1\n"), (METRICS[1], b"b 1\n")]]
    changed: list[Rendered] = [[(METRICS[0], b"a 2\n"), (METRICS[1], Incomparable(b"b 2\n"))]]
    wanted = read(lines.group(before))
    with pytest.raises(MemoryError):
        lines.group(changed)
    assert read(lines.group(before)) == wanted  # though it is the very same list
