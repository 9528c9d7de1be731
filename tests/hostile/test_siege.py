"""All attacks at once for a short while; ``make hostile`` does the same for an hour."""

from __future__ import annotations

from collections.abc import Callable

from tests.hostile.siege import run_siege
from tests.hostile.siege_report import judge, render_log, render_table

SECONDS = 60.0
SAMPLES = 12


def test_all_at_once_break_no_bound(tell: Callable[[str], None]) -> None:
    seen = run_siege(SECONDS, SAMPLES, lambda _sample: None)
    rows = judge(seen)
    tell(f"all attacks at once for {SECONDS:g} s:\n{render_table(rows)}")
    assert all(row.holds for row in rows), f"{render_table(rows)}\n{render_log(seen.log)}"
