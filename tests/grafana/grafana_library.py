"""What a person reads on stats and tables, by Grafana's own library on frames made of a Prometheus' answers.

The library is ``@grafana/data``, of several releases, as its package-lock.json pins them; it runs in node.
The frames are those of Grafana's data source for Prometheus, in its formats ``time_series`` and ``table``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.grafana.dashboard_queries import Json, find_panels, substitute
from tests.live.prometheus_server import Prometheus

HERE: Final = Path(__file__).parent / "npm"
INSTALLED: Final = HERE.parents[2] / ".cache" / "grafana-npm" / "node_modules"
RELEASES: Final = tuple(
    name for name in json.loads((HERE / "package.json").read_text())["dependencies"] if name.startswith("grafana-data-")
)
# Of an hour, scraped every 15 s.
LAST_HOUR: Final = {"__rate_interval": "1m", "__range": "3600s", "__range_s": "3600"}


class Cell(NamedTuple):
    """One value as it is shown: its text, its colour ("" where it is the text's), and where a click leads."""

    text: str
    color: str
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a panel shows: values of a stat, or rows of a table by the titles of its columns."""

    cells: tuple[Cell, ...]
    rows: tuple[Mapping[str, Cell], ...]
    no_value: str = ""

    def find_row(self, **wanted: str) -> Mapping[str, Cell]:
        """Return the one row with these texts."""
        (found,) = (row for row in self.rows if all(row[title].text == text for title, text in wanted.items()))
        return found


def read_dashboard(
    release: str,
    dashboard: Json,
    prometheus: Prometheus,
    now: float,
    variables: Mapping[str, str],
    *,
    ranges: Mapping[str, str] = LAST_HOUR,
) -> dict[str, Reading]:
    """Return what the stats and tables of a dashboard show at ``now``, by title (tables: ``table TITLE``)."""
    panels = [panel for panel in find_panels(dashboard) if panel["type"] in ("stat", "table")]
    values = {**variables, "__interval": "15s", **ranges}
    task = {
        "library": str(INSTALLED / release),
        "variables": {**variables, "__url_time_range": "from=now-1h&to=now"},
        "panels": [{"panel": panel, "frames": make_frames(panel, prometheus, now, values)} for panel in panels],
    }
    node = shutil.which("node")
    if node is None or not INSTALLED.exists():
        pytest.skip("there is no node, or not what package-lock.json lists: make display-test")
    run = subprocess.run(
        [node, str(HERE / "read_panels.cjs")], input=json.dumps(task), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return {_name(found): _take_reading(found) for found in json.loads(run.stdout)["panels"]}


def make_frames(panel: Json, prometheus: Prometheus, now: float, values: Mapping[str, str]) -> list[Json]:
    """Ask a panel's queries, and return the answers as frames."""
    frames: list[Json] = []
    for target in panel["targets"]:
        assert target["instant"], f"{panel['title']}: a stat or a table is of now"
        question = substitute(target["expr"], values)
        result = prometheus.ask("query", ("query", question), ("time", f"{now:.3f}"))["result"]
        if target["format"] == "table":
            frames += [_make_table(target["refId"], result, many=len(panel["targets"]) > 1)] if result else []
        else:
            frames += [_make_series(target["refId"], series) for series in result]
    return frames


def _make_table(ref: str, result: Sequence[Json], *, many: bool) -> Json:
    labels = sorted({label for series in result for label in series["metric"]})
    fields = [make_field("Time", "time", [series["value"][0] * 1000 for series in result])]
    fields += [make_field(name, "string", [series["metric"].get(name, "") for series in result]) for name in labels]
    fields.append(make_field(f"Value #{ref}" if many else "Value", "number", [_read(series) for series in result]))
    return {"refId": ref, "length": len(result), "fields": fields}


def _make_series(ref: str, series: Json) -> Json:
    value = {**make_field("Value", "number", [_read(series)]), "labels": series["metric"]}
    return {"refId": ref, "length": 1, "fields": [make_field("Time", "time", [series["value"][0] * 1000]), value]}


def make_field(name: str, kind: str, values: Sequence[float | str | None]) -> Json:
    """Return a field of a frame; ``kind`` is ``time`` (in milliseconds), ``number`` or ``string``."""
    return {"name": name, "type": kind, "config": {}, "values": list(values)}


def _read(series: Json) -> float:
    return float(series["value"][1])


def _name(found: Json) -> str:
    return f"table {found['title']}" if found["type"] == "table" else str(found["title"])


def _take_reading(found: dict[str, Any]) -> Reading:
    def take(cell: Json) -> Cell:
        return Cell(cell["text"], cell["color"], tuple(cell.get("links", ())))

    rows = tuple(dict(zip(found["columns"], map(take, row), strict=True)) for row in found.get("rows", ()))
    return Reading(tuple(map(take, found.get("values", ()))), rows, found.get("noValue", ""))
