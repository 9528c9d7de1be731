"""Lines that are kept from scrape to scrape are those that would be put together anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.prometheus.exposition import Family
from exporter.prometheus.grouped_lines import GroupedLines, Rendered, group_lines
from exporter.prometheus.metrics import Metric, MetricType

VMS = 3
METRICS = [Metric(f"kvm_{name}", MetricType.GAUGE, name) for name in "abc"]

TEXTS = st.lists(st.sampled_from([b"x\n", b"y\n", b"z\n"]), min_size=1, max_size=3)
LINES = st.dictionaries(st.sampled_from(METRICS), TEXTS)
# What becomes of each VM until the next scrape: nothing, or other lines.
SCRAPES = st.lists(st.lists(st.none() | LINES, min_size=VMS, max_size=VMS), min_size=1, max_size=6)


def read(families: list[Family]) -> dict[Metric, list[bytes]]:
    return {family.metric: list(family.chunks) for family in families}


def put(lines: GroupedLines, rendered: list[Rendered]) -> list[Family]:
    for at, of_vm in enumerate(rendered):
        lines.put(at, of_vm)
    return lines.list_families()


@given(SCRAPES)
def test_they_are_the_same_as_put_together_anew(scrapes: list[list[Rendered | None]]) -> None:
    lines, before = GroupedLines(VMS), list[Rendered]([{}] * VMS)
    for scrape in scrapes:
        before = [kept if given is None else given for kept, given in zip(before, scrape, strict=True)]
        assert read(put(lines, before)) == read(group_lines(before))


def test_a_metric_of_which_no_vm_gives_anything_else_is_the_same_family() -> None:
    lines = GroupedLines(2)
    first = {METRICS[0]: [b"a 1\n"], METRICS[1]: [b"b 1\n"]}
    second = {METRICS[0]: [b"a 2\n"], METRICS[1]: [b"b 2\n"]}
    before = put(lines, [first, second])
    same, changed = put(lines, [first, {**second, METRICS[1]: [b"b 3\n"]}])
    assert same is before[0]
    assert changed is not before[1]
    assert changed.chunks == [b"b 1\n", b"b 3\n"]


def test_what_is_the_same_object_is_not_looked_at() -> None:
    lines, rendered = GroupedLines(1), {METRICS[0]: [b"a 1\n"]}
    wanted = read(put(lines, [rendered]))
    rendered.clear()  # as nobody does
    assert read(put(lines, [rendered])) == wanted


class Incomparable(bytes):
    """Cannot be compared with what was there before."""

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        raise MemoryError


def test_of_what_failed_half_way_nothing_is_left() -> None:
    lines = GroupedLines(1)
    before = {METRICS[0]: [b"a 1\n"], METRICS[1]: [b"b 1\n"]}
    changed: Rendered = {METRICS[0]: [b"a 2\n"], METRICS[1]: [Incomparable(b"b 2\n")]}
    wanted = read(put(lines, [before]))
    with pytest.raises(MemoryError):
        lines.put(0, changed)
    assert read(put(lines, [before])) == wanted  # though it is the very same object
