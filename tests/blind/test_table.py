"""The table itself: what it says, and that the document says no other number of ways."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.blind.alerts import UP, Scraped, find_firing, split_sample
from tests.blind.claims import SURFACES
from tests.blind.table import ALERT, Row, count_wrong, pack_row, render_table, unpack_row
from tests.blind.ways import WAYS, Sees

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/sources-and-privileges.md"
LAB = ROOT / "tests/lab/inside"
# Those of test_false_all_clears.py in which an agent is not blind from the start.
OTHER_WAYS = ("agent frozen (SIGSTOP)", "textfile not renewed")
NOTHING: dict[str, list[str]] = {name: [] for name in (*SURFACES, ALERT)}
ROW = Row("no eyes", Sees.SOME, NOTHING, Scraped("up 1", False, True))


def test_a_false_claim_is_seen_in_the_table_and_in_its_sum() -> None:
    false = replace(ROW, way="one eye", false={"once": ["all is well"], "page": [], ALERT: []})
    head, well, wrong, total = render_table([ROW, false])
    assert head.split()[-2:] == ["log", "alert"]
    assert well.split() == ["no", "eyes", "some", *["ok"] * 8]
    assert wrong.split() == ["one", "eye", "some", "FALSE", "-", "-", "-", "ok", "-", "-", "ok"]
    assert total == "2 ways x 8 surfaces: 1 false all-clears"
    assert false.wrong == {"once": ["all is well"]}
    assert count_wrong([ROW, false]) == 1


def test_a_row_leaves_the_lab_as_it_is() -> None:
    assert unpack_row(pack_row(ROW)) == ROW


@pytest.mark.parametrize(
    ("line", "series", "value"),
    [
        ("kvm_exporter_complete 0.0", 'kvm_exporter_complete{job="kvm-notify-exporter", instance="host1"}', "0"),
        ('a_total{b="c d"} 2', 'a_total{job="kvm-notify-exporter", instance="host1", b="c d"}', "2"),
    ],
)
def test_a_sample_becomes_a_series_of_a_target(line: str, series: str, value: str) -> None:
    assert split_sample(line) == (series, value)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus has promtool")
@pytest.mark.parametrize("name", ["\U0001f600", "\ufffd", "\xe9"])
def test_whatever_strangers_call_their_vms_alerts_can_be_judged(name: str, tmp_path: Path) -> None:
    series = [(UP, "0x30"), (f'a{{b="{name}"}}', "1x30")]
    assert find_firing(series, tmp_path) == {"KvmNotifyExporterDown"}


def test_the_document_says_how_many_ways_there_are() -> None:
    found = re.search(r"in (\d+) ways and at random .*? the lab\s+in (\d+) more", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    inside = [name for path in LAB.glob("*/test_blind*.py") for name in re.findall(FIRST_WORD, path.read_text())]
    assert (int(found[1]), int(found[2])) == (len(WAYS) + len(OTHER_WAYS), len(inside))


# How a way of the lab begins: as a Way, or as a row that is made by hand.
FIRST_WORD = r"(?:Way\(\s*name=|check_\w+\(\s*)\"([^\"]+)\""
