"""Tables of now. Their columns have widths, so that the one that decides is on a screen of 1280 pixels, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from grafana.builder.colors import PLAIN, Mappings, Thresholds, render_thresholds
from grafana.builder.layout import GRID_GAP, GRID_UNIT, Json, Panel
from grafana.builder.panels import COUNT, PADDING, TITLE_HEIGHT, Query, render_override, render_target

# Grafana's, in pixels: a line of a table whose cells are small, or its head.
LINE_HEIGHT: Final = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table, in the order in which they are shown.

    ``field`` is a label, or the name that the table gave to one of its queries. A column with ``grows`` is at least as
    wide as ``width`` and takes what the others leave; one that is ``hidden`` is there for links alone.
    """

    field: str
    title: str
    width: int = 0
    grows: bool = False
    hidden: bool = False
    unit: str = ""
    decimals: int | None = None
    links: Sequence[Json] = ()
    mappings: Mappings | None = None
    thresholds: Thresholds = ()


# Links need it.
JOB: Final = Column(field="job", title="Job", hidden=True)


def hide(field: str) -> Column:
    """Return a column that only links need."""
    return Column(field=field, title=f"{field} (hidden)", hidden=True)


def count_of(field: str, title: str, width: int, *, thresholds: Thresholds = ()) -> Column:
    """Return a column of whole numbers, with separators."""
    return Column(field=field, title=title, width=width, unit=COUNT, decimals=0, thresholds=thresholds)


def make_table(
    number: int,
    title: str,
    description: str,
    queries: Mapping[str, str],
    columns: Sequence[Column],
    *,
    sort_by: Sequence[str],
    rows: int,
    ascending: bool = False,
    width: int = 24,
    no_value: str = "not known",
) -> Panel:
    """Return a table of now: one row for each set of labels that all queries share.

    The keys of ``queries`` name them for ``columns``; a query that no column shows brings only its labels. ``rows`` are
    seen without scrolling.
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
                "custom": {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": False, "inspect": False},
                "mappings": [],
                "noValue": no_value,
                "thresholds": render_thresholds(PLAIN),
                "unit": "none",
            },
            # The text for a table without rows would stand in each empty cell.
            "overrides": [
                {"matcher": {"id": "byRegexp", "options": ".*"}, "properties": [{"id": "noValue", "value": "-"}]},
                *(_render_column(column) for column in columns),
            ],
        },
        "options": {
            "cellHeight": "sm",
            "footer": {"countRows": False, "enablePagination": False, "fields": "", "reducer": ["sum"], "show": False},
            "showHeader": True,
            "sortBy": [{"desc": not ascending, "displayName": name} for name in sort_by],
        },
        "targets": [
            render_target(refs[name], Query(expr, ""), instant=True, table=True) for name, expr in queries.items()
        ],
        "transformations": [*merge, {"id": "organize", "options": organize}],
    }
    return Panel(number, "table", title, description, width, height_of(rows), body)


def height_of(rows: int) -> int:
    """Return how high a table has to be, in units of the grid, to show this many rows."""
    return math.ceil((TITLE_HEIGHT + PADDING + LINE_HEIGHT * (1 + rows) + GRID_GAP) / GRID_UNIT)


def _render_column(column: Column) -> Json:
    properties: list[tuple[str, Any]] = []
    if column.hidden:
        properties.append(("custom.hidden", True))
    elif column.width:
        properties.append(("custom.minWidth" if column.grows else "custom.width", column.width))
    if column.unit:
        properties.append(("unit", column.unit))
    if column.decimals is not None:
        properties.append(("decimals", column.decimals))
    if column.links:
        properties.append(("links", list(column.links)))
    if column.mappings is not None:
        properties.append(("mappings", column.mappings))
    if column.thresholds:
        properties.append(("thresholds", render_thresholds(column.thresholds)))
    if column.mappings is not None or column.thresholds:
        properties.append(("custom.cellOptions", {"type": "color-text"}))
    return render_override(column.title, [{"id": key, "value": value} for key, value in properties])
