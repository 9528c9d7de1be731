"""What is on the screen: whole tables on one of 1280 pixels, heads that can be read, and no page that hides rows."""

from __future__ import annotations

import re

import pytest

from grafana.builder.layout import COLUMNS, GRID_GAP, GRID_UNIT
from tests.grafana.dashboard_queries import Json, find_panels, read_dashboards
from tests.grafana.grafana_display import find_fields

# What Grafana leaves of 1280 pixels: 16 of padding on each side, and the scroll bar; in a panel 8 on each side.
PAGE_WIDTH = 1280 - 2 * 16 - 8
PANEL_PADDING = 2 * 8 + 2
TITLE_HEIGHT, LINE_HEIGHT = 32, 36
# Of a head: a letter on average, and padding with the arrow of a sorted column.
LETTER_WIDTH, HEAD_PADDING = 8, 24

TABLES: list[tuple[str, Json]] = [
    (dashboard["uid"], panel)
    for dashboard in read_dashboards()
    for panel in find_panels(dashboard)
    if panel["type"] == "table"
]
tables = pytest.mark.parametrize(("uid", "table"), TABLES, ids=[f"{uid}-{table['title']}" for uid, table in TABLES])


def find_widths(table: Json) -> dict[str, int]:
    """The least width of each column that is shown; Grafana gives 150 pixels to one that says nothing."""
    shown = {title: field["custom"] for title, field in find_fields(table).items() if not field["custom"].get("hidden")}
    return {title: custom.get("width", custom.get("minWidth", 150)) for title, custom in shown.items()}


def find_inner_width(panel: Json) -> float:
    columns: int = panel["gridPos"]["w"]
    return (PAGE_WIDTH + GRID_GAP) * columns / COLUMNS - GRID_GAP - PANEL_PADDING


@tables
def test_a_table_is_whole_on_a_narrow_screen(uid: str, table: Json) -> None:
    widths = find_widths(table)
    assert sum(widths.values()) <= find_inner_width(table), f"{uid}: {widths}"


@tables
def test_a_table_uses_a_wide_screen(uid: str, table: Json) -> None:
    """One column grows, and that is one with names, which may be long."""
    growing = [title for title, field in find_fields(table).items() if "minWidth" in field["custom"]]
    assert len(growing) == 1, uid


@tables
def test_heads_can_be_read(uid: str, table: Json) -> None:
    for title, width in find_widths(table).items():
        assert width >= LETTER_WIDTH * len(title) + HEAD_PADDING, f"{uid}: {title}"


@tables
def test_no_icon_and_no_page_takes_room_from_a_table(uid: str, table: Json) -> None:
    assert not table["fieldConfig"]["defaults"]["custom"]["filterable"], uid
    assert not table["options"]["footer"]["enablePagination"], uid
    height = table["gridPos"]["h"] * GRID_UNIT - GRID_GAP - TITLE_HEIGHT - PANEL_PADDING
    rows = (height - LINE_HEIGHT) / LINE_HEIGHT
    assert rows >= 1, uid
    most = [int(match[1]) for target in table["targets"] if (match := re.search(r"topk\((\d+),", target["expr"]))]
    assert all(rows >= wanted for wanted in most), uid


@tables
def test_the_job_is_not_shown_and_is_there_for_links(uid: str, table: Json) -> None:
    organize = next(t["options"] for t in table["transformations"] if t["id"] == "organize")
    if "job" in organize["renameByName"]:
        assert find_fields(table)["Job"]["custom"]["hidden"] is True, uid
    assert "job" not in organize["excludeByName"], uid


# What Grafana 11 has above a dashboard: two bars, and the choice of variables with the space around it.
CHROME_HEIGHT = 2 * 40 + 16 + 32 + 8
SCREEN_HEIGHT = 768


@pytest.mark.parametrize("uid", ["kvm-notify-fleet", "kvm-notify-host"])
def test_who_is_stalled_is_on_the_first_screen(uid: str) -> None:
    """Directly below the numbers: who, whose, for how long, since when, how hard, and where.

    On the fleet's, the hosts where nobody can tell stand beside the numbers.
    """
    (dashboard,) = (one for one in read_dashboards() if one["uid"] == uid)
    (table,) = (panel for panel in find_panels(dashboard) if panel["title"] == "Stalled now")
    place = table["gridPos"]
    assert CHROME_HEIGHT + (place["y"] + place["h"]) * GRID_UNIT <= SCREEN_HEIGHT
    above = [p for p in find_panels(dashboard) if p["gridPos"]["y"] + p["gridPos"]["h"] == place["y"]]
    assert {panel["type"] for panel in above if panel["title"] != "Agents down or blind"} == {"stat"}
    wanted = ["VM", "Owner", "vCPU", "Stalled for", "Since", "Exits/s of VM", "Host"]
    assert list(find_widths(table))[: len(wanted)] == wanted
    linked = [title for title, field in find_fields(table).items() if field.get("links")]
    assert {"VM", "Host"} <= set(linked)


def test_the_first_screen_of_the_fleet_names_whatever_it_counts() -> None:
    """Who is down or blind stands beside the numbers, with room for three."""
    fleet = next(one for one in read_dashboards() if one["uid"] == "kvm-notify-fleet")
    tables = [panel for panel in find_panels(fleet) if panel["type"] == "table"]
    assert [table["title"] for table in tables[:3]] == ["Agents down or blind", "Stalled now", "Firing alerts"]
    for place in (table["gridPos"] for table in tables[:3]):
        assert CHROME_HEIGHT + (place["y"] + place["h"]) * GRID_UNIT <= SCREEN_HEIGHT
    beside = tables[0]["gridPos"]
    height = beside["h"] * GRID_UNIT - GRID_GAP - TITLE_HEIGHT - PANEL_PADDING
    assert height // LINE_HEIGHT - 1 >= 3
    numbers = [panel["gridPos"] for panel in find_panels(fleet) if panel["type"] == "stat"]
    assert {place["x"] + place["w"] <= beside["x"] for place in numbers} == {True}
    assert max(place["y"] + place["h"] for place in numbers) == beside["y"] + beside["h"]
