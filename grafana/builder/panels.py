"""Kinds of panels: a number, a graph, and states over time; ``tables`` has the fourth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grafana.builder.colors import PLAIN, Mappings, Thresholds, render_thresholds
from grafana.builder.layout import DATASOURCE, GRID_GAP, GRID_UNIT, Json, Panel

# Whole numbers, with separators.
COUNT: Final = "locale"
PER_HOUR: Final = "si:/h"
# Grafana's, in pixels: a panel's title and padding; a line of a legend, its head among them; and its share of the rest.
TITLE_HEIGHT: Final = 32
PADDING: Final = 2 * 8
LEGEND_LINE_HEIGHT: Final = 24
LEGEND_SHARE: Final = 0.35
FEW_LINES: Final = 3
# In units of the grid: what is below the numbers is on a small screen, too.
STAT_HEIGHT: Final = 3
# Grafana writes a number below 0 on a logarithmic axis that begins at 0. Of what is shown nothing is below 0.
NO_NEGATIVE: Final[Mappings] = [
    {"options": {"from": -1e9, "to": -1e-9, "result": {"index": 0, "text": ""}}, "type": "range"}
]


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and what its series are called: ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str = "__auto"


def make_stat(
    number: int,
    title: str,
    description: str,
    query: Query,
    *,
    unit: str = "none",
    width: int = 4,
    no_value: str = "not known",
    thresholds: Thresholds = PLAIN,
    mappings: Mappings | None = None,
    name_colors: Mapping[str, str] | None = None,
    decimals: int | None = None,
) -> Panel:
    """Return a panel with one number, that of now; ``name_colors`` shows the series' name instead, in these colours."""
    defaults: Json = {
        "color": {"mode": "thresholds"},
        "mappings": mappings or [],
        "noValue": no_value,
        "thresholds": render_thresholds(thresholds),
        "unit": unit,
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    body = {
        "fieldConfig": {"defaults": defaults, "overrides": _color_overrides(name_colors or {})},
        "options": {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "name" if name_colors else "value",
        },
        "targets": [render_target("A", query, instant=True)],
    }
    return Panel(number, "stat", title, description, width, STAT_HEIGHT, body)


def make_graph(
    number: int,
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int = 12,
    lines: int = FEW_LINES,
    stacked: bool = False,
    linear_below: float | None = None,
    colors: Mapping[str, str] | None = None,
    links: Sequence[Json] = (),
    maximum: float | None = None,
    last: bool = True,
    no_value: str = "not known",
) -> Panel:
    """Return a panel with lines over time; gaps stay gaps.

    ``lines`` is how many the legend has room for, the highest first. With ``linear_below`` the axis is logarithmic from
    there on: one guest that floods would press all others to the ground. COUNT as the unit is for whole numbers.
    Without ``last`` the legend has no last value: that of a line which has ended is not of now.
    """
    custom: Json = {
        "axisLabel": "",
        "drawStyle": "line",
        "fillOpacity": 30 if stacked else 0 if linear_below else 10,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
    }
    if linear_below:
        custom["scaleDistribution"] = {"type": "symlog", "log": 10, "linearThreshold": linear_below}
    if unit != "s":  # where nothing happens Grafana draws an axis up to 100, or 10,000 %
        custom["axisSoftMax"] = 10 if unit == PER_HOUR and not linear_below else 1  # 0.2 an hour would be "200 m/h"
    defaults: Json = {
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "links": list(links),
        "mappings": NO_NEGATIVE if linear_below else [],
        "min": 0,
        "noValue": no_value,
        "thresholds": render_thresholds(PLAIN),
        "unit": unit,
    }
    if unit == COUNT:
        defaults["decimals"] = 0
    if maximum is not None:
        defaults["max"] = maximum
    body = {
        "fieldConfig": {"defaults": defaults, "overrides": _color_overrides(colors or {})},
        "options": {
            "legend": {
                "calcs": [*(["lastNotNull"] if last else []), "max"],
                "displayMode": "table",
                "placement": "bottom",
            }
            | {"showLegend": True, "sortBy": "Max", "sortDesc": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [render_target(chr(ord("A") + i), query) for i, query in enumerate(queries)],
    }
    return Panel(number, "timeseries", title, description, width, graph_height_of(lines), body)


def graph_height_of(lines: int) -> int:
    """Return how high a graph has to be, in units of the grid, for a legend of so many lines."""
    legend = LEGEND_LINE_HEIGHT * (lines + 1)
    return math.ceil((legend / LEGEND_SHARE + TITLE_HEIGHT + PADDING + GRID_GAP) / GRID_UNIT)


def make_timeline(
    number: int,
    title: str,
    description: str,
    query: Query,
    *,
    mappings: Mappings,
    width: int = 12,
    no_value: str = "not known",
) -> Panel:
    """Return a panel with a bar for each series, coloured by its state; gaps stay gaps."""
    body = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "custom": {"fillOpacity": 70, "lineWidth": 0},
                "mappings": mappings,
                "noValue": no_value,
                "thresholds": render_thresholds(PLAIN),
                "unit": "none",
            },
            "overrides": [],
        },
        "options": {
            "alignValue": "left",
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "mergeValues": True,
            "rowHeight": 0.9,
            "showValue": "auto",
            "tooltip": {"mode": "single", "sort": "none"},
        },
        "targets": [render_target("A", query)],
    }
    return Panel(number, "state-timeline", title, description, width, 8, body)


def render_target(ref: str, query: Query, *, instant: bool = False, table: bool = False) -> Json:
    """Return a query as a panel has it, asked for now or over the time range."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": "table" if table else "time_series",
        "instant": instant,
        "legendFormat": query.legend,
        "range": not instant,
        "refId": ref,
    }


def _color_overrides(colors: Mapping[str, str]) -> list[Json]:
    return [
        render_override(name, [{"id": "color", "value": {"fixedColor": color, "mode": "fixed"}}])
        for name, color in colors.items()
    ]


def render_override(name: str, properties: list[Json]) -> Json:
    """Return what is set for the field of that name."""
    return {"matcher": {"id": "byName", "options": name}, "properties": properties}
