"""What a person sees in the graphs: the worst first and by its name, and small numbers beside large ones."""

from __future__ import annotations

import re

import pytest

from grafana.builder.layout import GRID_GAP, GRID_UNIT
from tests.grafana.dashboard_linter import VALUES
from tests.grafana.dashboard_queries import Json, find_panels, read_dashboards, substitute
from tests.grafana.promql import find_selectors

GRAPHS: list[tuple[str, Json]] = [
    (dashboard["uid"], panel)
    for dashboard in read_dashboards()
    for panel in find_panels(dashboard)
    if panel["type"] == "timeseries"
]
graphs = pytest.mark.parametrize(("uid", "graph"), GRAPHS, ids=[f"{uid}-{graph['title']}" for uid, graph in GRAPHS])

# Grafana's: a panel's title and padding, a line of a legend, and the legend's share of what is left.
FRAME_HEIGHT, LEGEND_LINE_HEIGHT, LEGEND_SHARE = 32 + 2 * 8, 24, 0.35
EXITS = re.compile(r"kvm_(vcpu|vm|host)_(notify_window_)?exits_total|(vm|instance):kvm_\w+_notify_window_exits:rate5m")
COUNTS = re.compile(r"kvm_\w+_(vms|vcpus|vcpus_no_forward_progress|traced_vcpus|source_up)")


def find_legend_lines(graph: Json) -> int:
    height = graph["gridPos"]["h"] * GRID_UNIT - GRID_GAP - FRAME_HEIGHT
    return int(height * LEGEND_SHARE / LEGEND_LINE_HEIGHT) - 1


def find_metrics(graph: Json) -> set[str]:
    return {s.metric for target in graph["targets"] for s in find_selectors(substitute(target["expr"], VALUES))}


@graphs
def test_the_highest_line_is_named_first(uid: str, graph: Json) -> None:
    legend = graph["options"]["legend"]
    assert (legend["sortBy"], legend["sortDesc"]) == ("Max", True), uid
    assert "max" in legend["calcs"], uid


@graphs
def test_a_legend_has_room(uid: str, graph: Json) -> None:
    """There are four states of protection, many vCPUs and many hosts."""
    assert find_legend_lines(graph) >= 3, uid
    legends = " ".join(target["legendFormat"] for target in graph["targets"])
    if re.search(r"\{\{(protection|vcpu|who)\}\}", legends):
        assert find_legend_lines(graph) >= 4, uid


@graphs
def test_a_legend_has_names_and_no_uuids(uid: str, graph: Json) -> None:
    for target in graph["targets"]:
        assert not re.search(r"\{\{(vm|uuid)\}\}", target["legendFormat"]), uid


@graphs
def test_one_guest_that_floods_hides_no_other(uid: str, graph: Json) -> None:
    """9,100 exits a second beside a few a day: an axis is logarithmic where exits are counted; 0 stays on it."""
    custom, unit = graph["fieldConfig"]["defaults"]["custom"], graph["fieldConfig"]["defaults"]["unit"]
    counts_exits = any(EXITS.fullmatch(metric) for metric in find_metrics(graph))
    if (counts_exits and unit not in {"percentunit", "short"}) or "a day per" in graph["title"]:
        scale = custom["scaleDistribution"]
        assert (scale["type"], scale["log"]) == ("symlog", 10), uid
        assert 0 < scale["linearThreshold"] <= 1, uid
        assert custom["stacking"]["mode"] == "none", uid  # lines that are added up mislead on such an axis


@graphs
def test_an_axis_does_not_exaggerate_nothing(uid: str, graph: Json) -> None:
    """Grafana draws 0 on an axis up to 100, and a share of 0 on one up to 10,000 %."""
    defaults = graph["fieldConfig"]["defaults"]
    linear_per_hour = defaults["unit"] == "si:/h" and "scaleDistribution" not in defaults["custom"]
    least = 10 if linear_per_hour else 1  # Grafana writes 0.2 an hour as "200 m/h"
    assert defaults["unit"] == "s" or defaults["custom"]["axisSoftMax"] == least, uid
    assert defaults["min"] == 0, uid


@graphs
def test_counts_are_whole_and_have_an_axis_of_one_at_least(uid: str, graph: Json) -> None:
    defaults = graph["fieldConfig"]["defaults"]
    counted = any(COUNTS.fullmatch(metric) for metric in find_metrics(graph))
    if counted and "rate(" not in graph["targets"][0]["expr"]:
        assert (defaults["unit"], defaults["decimals"], defaults["custom"]["axisSoftMax"]) == ("locale", 0, 1), uid
