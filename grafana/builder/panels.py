"""The four kinds of panels in use: a number, a graph, a table, and states over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from grafana.builder.colors import PLAIN, Mappings, Thresholds, render_thresholds
from grafana.builder.layout import DATASOURCE, Json, Panel

# No rows or lines may also be due to series that this Prometheus does not keep.
NOTHING_FOUND: Final = "nothing found"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and what its series are called: ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table, in the order in which they are shown.

    ``field`` is a label, or the name that the table gave to one of its queries.
    """

    field: str
    title: str
    unit: str = ""
    width: int | None = None
    decimals: int | None = None
    links: Sequence[Json] = ()
    mappings: Mappings | None = None
    thresholds: Thresholds = ()


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
        "targets": [_target("A", query, instant=True)],
    }
    return Panel(number, "stat", title, description, width, 4, body)


def make_graph(
    number: int,
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int = 12,
    stacked: bool = False,
    colors: Mapping[str, str] | None = None,
    links: Sequence[Json] = (),
    maximum: float | None = None,
    no_value: str = "No data",
) -> Panel:
    """Return a panel with lines over time; gaps stay gaps."""
    custom: Json = {
        "axisLabel": "",
        "drawStyle": "line",
        "fillOpacity": 30 if stacked else 10,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
    }
    defaults: Json = {
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "links": list(links),
        "mappings": [],
        "min": 0,
        "noValue": no_value,
        "thresholds": render_thresholds(PLAIN),
        "unit": unit,
    }
    if maximum is not None:
        defaults["max"] = maximum
    body = {
        "fieldConfig": {"defaults": defaults, "overrides": _color_overrides(colors or {})},
        "options": {
            "legend": {"calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom"}
            | {"showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [_target(chr(ord("A") + i), query) for i, query in enumerate(queries)],
    }
    return Panel(number, "timeseries", title, description, width, 8, body)


def make_timeline(
    number: int,
    title: str,
    description: str,
    query: Query,
    *,
    mappings: Mappings,
    width: int = 12,
    no_value: str = "No data",
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
        "targets": [_target("A", query)],
    }
    return Panel(number, "state-timeline", title, description, width, 8, body)


def make_table(
    number: int,
    title: str,
    description: str,
    queries: Mapping[str, str],
    columns: Sequence[Column],
    *,
    sort_by: str,
    width: int = 24,
    height: int = 8,
    no_value: str = "No data",
) -> Panel:
    """Return a table of now: one row for each set of labels that all queries share.

    The keys of ``queries`` name them for ``columns``; a query that no column shows brings only its labels.
    """
    # Grafana's names for the column with a query's values.
    refs = {name: chr(ord("A") + i) for i, name in enumerate(queries)}
    fields = {name: f"Value #{ref}" if len(queries) > 1 else "Value" for name, ref in refs.items()}
    # A label is a text, also one that looks like a number: 0x2b000643, 48.0.
    columns = [column if column.field in fields else replace(column, unit="string") for column in columns]
    shown = [fields.get(column.field, column.field) for column in columns]
    unshown = [field for field in fields.values() if field not in shown]
    organize = {
        "excludeByName": dict.fromkeys(["Time", *unshown], True),
        "indexByName": {field: index for index, field in enumerate(shown)},
        "renameByName": {field: column.title for field, column in zip(shown, columns, strict=True)},
    }
    merge: list[Json] = [{"id": "merge", "options": {}}] if len(queries) > 1 else []
    body = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "custom": {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True, "inspect": False},
                "mappings": [],
                "noValue": no_value,
                "thresholds": render_thresholds(PLAIN),
                "unit": "none",
            },
            # The text for a table without rows would stand in each empty cell.
            "overrides": [
                {"matcher": {"id": "byRegexp", "options": ".*"}, "properties": [{"id": "noValue", "value": "-"}]},
                *(override for column in columns if (override := _column_override(column))),
            ],
        },
        "options": {
            "cellHeight": "sm",
            "footer": {"countRows": False, "enablePagination": True, "fields": "", "reducer": ["sum"], "show": False},
            "showHeader": True,
            "sortBy": [{"desc": True, "displayName": sort_by}],
        },
        "targets": [_target(refs[name], Query(expr, ""), instant=True, table=True) for name, expr in queries.items()],
        "transformations": [*merge, {"id": "organize", "options": organize}],
    }
    return Panel(number, "table", title, description, width, height, body)


def _target(ref: str, query: Query, *, instant: bool = False, table: bool = False) -> Json:
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
        _override(name, [{"id": "color", "value": {"fixedColor": color, "mode": "fixed"}}])
        for name, color in colors.items()
    ]


def _column_override(column: Column) -> Json | None:
    properties: list[tuple[str, Any]] = []
    if column.unit:
        properties.append(("unit", column.unit))
    if column.decimals is not None:
        properties.append(("decimals", column.decimals))
    if column.width is not None:
        properties.append(("custom.width", column.width))
    if column.links:
        properties.append(("links", list(column.links)))
    if column.mappings is not None:
        properties.append(("mappings", column.mappings))
    if column.thresholds:
        properties.append(("thresholds", render_thresholds(column.thresholds)))
    if column.mappings is not None or column.thresholds:
        properties.append(("custom.cellOptions", {"type": "color-text"}))
    return _override(column.title, [{"id": key, "value": value} for key, value in properties]) if properties else None


def _override(name: str, properties: list[Json]) -> Json:
    return {"matcher": {"id": "byName", "options": name}, "properties": properties}
