"""The table of ways times surfaces: what each surface has claimed falsely."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.blind.alerts import Scraped, claim_by_alerts
from tests.blind.claims import SURFACES, Truth
from tests.blind.surfaces import Answers
from tests.blind.ways import Sees

ALERT: Final = "alert"
# A property of a junit file: a row that leaves the lab.
ROW_PROPERTY: Final = "blind"
COLUMNS: Final = (*SURFACES, ALERT)


@dataclass(frozen=True, slots=True)
class Row:
    """One way: what it leaves to be seen, the false claims by surface, and what Prometheus has scraped.

    It lacks the column of alerts until `judge_alerts`: where promtool is, an agent in the lab is not.
    """

    way: str
    sees: Sees
    false: dict[str, list[str]]
    scraped: Scraped

    @property
    def wrong(self) -> dict[str, list[str]]:
        """The surfaces that have claimed something falsely, with what."""
        return {surface: claims for surface, claims in self.false.items() if claims}

    def judge_alerts(self, directory: Path) -> Row:
        """Fill in the column of alerts, by promtool."""
        return replace(self, false={**self.false, ALERT: list(claim_by_alerts(self.scraped, directory))})


def make_row(way: str, sees: Sees, truth: Truth, answers: Answers) -> Row:
    """Hold what an agent says against the truth."""
    false = {name: list(claim(truth, answers)) for name, claim in SURFACES.items()}
    return Row(way, sees, false, Scraped.take(truth, answers))


def pack_row(row: Row) -> str:
    """One line for a report that leaves the lab."""
    return json.dumps([row.way, row.sees, row.false, row.scraped])


def unpack_row(line: str) -> Row:
    """What `pack_row` has packed."""
    way, sees, false, scraped = json.loads(line)
    return Row(way, Sees(sees), false, Scraped(*scraped))


def render_table(rows: Sequence[Row]) -> Iterator[str]:
    """The table, with its sum; a cell is ``-`` where a surface was not asked."""
    width = max((len(row.way) for row in rows), default=0)
    yield f"{'ways to be blind':<{width}}  sees  {'  '.join(COLUMNS)}"
    for row in rows:
        yield f"{row.way:<{width}}  {row.sees:<4}  {'  '.join(render_cells(row))}"
    yield f"{len(rows)} ways x {len(COLUMNS)} surfaces: {count_wrong(rows)} false all-clears"


def render_cells(row: Row) -> Iterator[str]:
    for column in COLUMNS:
        claims = row.false.get(column)
        yield f"{'-' if claims is None else 'FALSE' if claims else 'ok':<{len(column)}}"


def count_wrong(rows: Iterable[Row]) -> int:
    """How many surfaces have claimed something falsely."""
    return sum(len(row.wrong) for row in rows)
