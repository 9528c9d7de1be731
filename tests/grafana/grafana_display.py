"""What a person sees of one value in a stat or in a table's cell: text and colour, as Grafana chooses them.

Written after packages/grafana-data/src/field/displayProcessor.ts: a mapping wins; a number has the colour of the last
threshold that it reaches; null, and a panel without data, has the colour of the base and the text ``noValue``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tests.grafana.dashboard_queries import Json

PLAIN_TEXT: Final = "text"  # the theme's
Value = float | str | None


class Shown(NamedTuple):
    text: str
    color: str


def find_fields(panel: Json) -> dict[str, Json]:
    """Return the configuration of each field that a stat or a table shows, by its title."""
    if panel["type"] == "stat":
        return {panel["title"]: panel["fieldConfig"]["defaults"]}
    if panel["type"] != "table":
        return {}
    organize = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
    return {title: find_field(panel, title) for title in organize["renameByName"].values()}


def find_field(panel: Json, title: str) -> Json:
    """Return a field's configuration: the panel's, and over it what is said for this field."""
    field: Json = {**panel["fieldConfig"]["defaults"]}
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"] in ({"id": "byName", "options": title}, {"id": "byRegexp", "options": ".*"}):
            for found in override["properties"]:
                place, _, name = found["id"].rpartition(".")
                if place == "custom":
                    field["custom"] = {**field.get("custom", {}), name: found["value"]}
                else:
                    field[name] = found["value"]
    return field


def find_colors(field: Json) -> Iterator[str]:
    """Yield each colour that a field can have."""
    yield from (step["color"] for step in field["thresholds"]["steps"])
    yield from (option["color"] for options in _find_options(field) for option in options.values())


def show(field: Json, value: Value) -> Shown:
    """Return what is shown of ``value``; None is null, or no data at all."""
    for options in _find_options(field):
        key = f"{value:g}" if isinstance(value, int | float) else value
        if key in options:
            return Shown(options[key]["text"], options[key]["color"])
    steps = field["thresholds"]["steps"]
    reached = [
        step["color"]
        for step in steps[1:]
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= step["value"]
    ]
    color = [steps[0]["color"], *reached][-1]
    if _is_cell(field) and field["custom"]["cellOptions"]["type"] == "auto":
        color = PLAIN_TEXT
    return Shown(field["noValue"] if value is None else _format(field, value), color)


def _format(field: Json, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if field["unit"] == "locale":
        return f"{value:,.{field.get('decimals', 0)}f}"
    return f"{value:g}"


def _is_cell(field: Json) -> bool:
    return "cellOptions" in field.get("custom", {})


def _find_options(field: Json) -> Iterator[dict[str, Any]]:
    for mapping in field.get("mappings", ()):
        yield mapping["options"]
