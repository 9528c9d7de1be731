"""The README shows two guests of real QEMUs: the real commands show the same of them here, but for the numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import run_agent
from tests.documents import DOCS, README, find_blocks
from tests.live.samples import find_rows, open_guests, read_metrics, run_once

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def pids() -> Iterator[list[int]]:
    with open_guests() as pids:
        yield pids


def find_sample(document: Path, command: str) -> str:
    """What a document shows as the output of a command."""
    (sample,) = (block for block in find_blocks(document, "") if block.startswith(f"$ {command}"))
    return sample.partition("\n")[2]


def blank(text: str) -> str:
    """A text without pids."""
    return re.sub(r"\b\d{2,}\b", "PID", text)


def select(table: str, pids: list[int]) -> list[dict[str, str]]:
    """The rows of a table of ``once`` about these processes, but for what differs from run to run and host to host."""
    header = re.split(r"\s{2,}", table.splitlines()[0])
    rows = [dict(zip(header, map(blank, row), strict=True)) for row in find_rows(table, pids)]
    return [{name: row[name] for name in header if name not in ("PID", "TID", "EXITS", "PROTECTION")} for row in rows]


def test_once_shows_the_same_rows(pids: list[int]) -> None:
    sample = find_sample(README, "kvm-notify-exporter once\n")
    printed = run_once()
    assert printed.split("\n")[0].split() == sample.split("\n")[0].split()
    shown = select(sample, [int(line.split()[4]) for line in sample.splitlines()[1:]])
    assert len(shown) == 4
    assert select(printed, pids) == shown


def test_metrics_are_the_same_series(pids: list[int]) -> None:
    sample = find_sample(DOCS / "metrics.md", "curl -s localhost:9750/metrics")
    ours = re.compile("|".join(rf"\b{pid}\b" for pid in pids))
    printed = [line.rpartition(" ")[0] for line in read_metrics() if ours.search(line)]
    shown = [line.rpartition(" ")[0] for line in sample.splitlines()]
    assert [blank(line) for line in printed] == [blank(line) for line in shown]


def test_check_has_the_same_lines(pids: list[int]) -> None:
    sample = find_sample(README, "kvm-notify-exporter check\n")

    def find_names(text: str) -> list[str]:
        return [re.split(r"\s{2,}", line)[0] for line in text.splitlines()]

    assert pids
    assert find_names(run_agent("check", expect=(0, 1))) == find_names(sample)
