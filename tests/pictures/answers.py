"""What a real Prometheus says to a dashboard's queries, as Grafana's data source for it hands that to the panels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tests.grafana.dashboard_queries import Json, find_panels, substitute
from tests.grafana.grafana_library import make_field, make_frames
from tests.live.prometheus_server import Prometheus

# What is told to Grafana's data source as the scrape interval.
SCRAPE_SECONDS: Final = 60
# Of those that Grafana rounds an interval to, what a panel of half a screen's width comes to.
STEPS: Final = (60, 120, 300, 600)
POINTS: Final = 600
UNITS: Final = {"m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class View:
    """A dashboard at one time: until when, and what was chosen. ``texts`` are what the choices are shown as."""

    dashboard: Json
    end: float
    choices: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> int:
        """How long the dashboard's own time range is."""
        match = re.fullmatch(r"now-(\d+)([mhd])", self.dashboard["time"]["from"])
        if match is None:
            raise ValueError(f"a range that is not understood: {self.dashboard['time']}")
        return int(match[1]) * UNITS[match[2]]

    @property
    def step(self) -> int:
        return next(step for step in STEPS if step * POINTS >= self.seconds)

    def find_values(self) -> dict[str, str]:
        """What Grafana replaces the variables by in a query: all there is, of what was not chosen."""
        chosen = {str(variable["name"]): ".+" for variable in self.dashboard["templating"]["list"]}
        times = {"__interval": f"{self.step}s", "__range": f"{self.seconds}s", "__range_s": str(self.seconds)}
        rate_interval = max(self.step + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS)
        return chosen | dict(self.choices) | times | {"__rate_interval": f"{rate_interval}s"}


def ask_dashboard(view: View, prometheus: Prometheus) -> Json:
    """Ask all that a dashboard asks; the frames of each panel by its id, and the marks over its graphs."""
    values = view.find_values()
    frames = {panel["id"]: _ask_panel(panel, view, prometheus, values) for panel in find_panels(view.dashboard)}
    marks = [
        mark
        for annotation in view.dashboard["annotations"]["list"]
        if "expr" in annotation
        for mark in _find_marks(annotation, view, prometheus, values)
    ]
    return {
        "dashboard": view.dashboard,
        "frames": frames,
        "marks": marks,
        "range": [(view.end - view.seconds) * 1000, view.end * 1000],
        "variables": {"datasource": "Prometheus", **view.choices},
        "texts": {"datasource": "Prometheus", **view.texts},
    }


def _ask_panel(panel: Json, view: View, prometheus: Prometheus, values: Mapping[str, str]) -> list[Json]:
    if panel["targets"][0]["instant"]:
        return make_frames(panel, prometheus, view.end, values)
    return [
        frame
        for target in panel["targets"]
        for frame in _make_lines(target, _ask_range(target["expr"], view, prometheus, values), view)
    ]


def _ask_range(expr: str, view: View, prometheus: Prometheus, values: Mapping[str, str]) -> list[dict[str, Any]]:
    start = math.ceil((view.end - view.seconds) / view.step) * view.step
    return prometheus.query_range(substitute(expr, values), start, view.end, view.step)


def _make_lines(target: Json, result: list[dict[str, Any]], view: View) -> Iterator[Json]:
    """Yield a frame for each series; all have the same times, and null where there is no sample."""
    start = math.ceil((view.end - view.seconds) / view.step) * view.step
    times = range(start, int(view.end) + 1, view.step)
    for series in result:
        values = {int(seconds): float(value) for seconds, value in series["values"]}
        shown = [values.get(time) for time in times]
        known = [None if value is None or not math.isfinite(value) else value for value in shown]
        yield {
            "refId": target["refId"],
            "name": _name_line(target["legendFormat"], series["metric"]),
            "length": len(times),
            "fields": [
                make_field("Time", "time", [time * 1000 for time in times]),
                {**make_field("Value", "number", known), "labels": series["metric"]},
            ],
        }


def _name_line(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def _find_marks(annotation: Json, view: View, prometheus: Prometheus, values: Mapping[str, str]) -> Iterator[Json]:
    """Yield where an annotation's expression has a series: from and to in milliseconds, and the colour."""
    for series in _ask_range(annotation["expr"], view, prometheus, values):
        spans: list[list[float]] = []
        for seconds, _value in series["values"]:
            if spans and seconds - spans[-1][1] <= view.step:
                spans[-1][1] = seconds
            else:
                spans.append([seconds, seconds])
        yield from ({"from": a * 1000, "to": b * 1000, "color": annotation["iconColor"]} for a, b in spans)
