"""Rules of our own for dashboards: each yields what is wrong with one.

Only what is exported is asked for, joins cannot fail, no variable is dead, tables show what they are given, and what
is absent is not shown as 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import promql_parser as ast
import yaml

from exporter.prometheus.metrics import METRICS, Metric, MetricType
from grafana.builder.colors import NEUTRAL
from grafana.builder.queries import ALERT_ACTIVE_SINCE, ALERTS, UP
from tests.grafana.dashboard_linter import VALUES, Rule, find_calls, find_expressions, walk_parsed
from tests.grafana.dashboard_queries import (
    DASHBOARDS,
    Json,
    find_panels,
    find_query_variables,
    find_variables,
    substitute,
)
from tests.grafana.promql import find_labels, find_selectors
from tests.known_statistics import STATISTIC_METRICS

# Prometheus gives these names their values, and every time range and every link may use them.
GLOBALS: Final = {"__rate_interval", "__range", "__range_s", "__interval"}
PROMETHEUS_OWN: Final[Mapping[str, frozenset[str]]] = {
    metric.name: frozenset(metric.labels) for metric in (UP, ALERTS, ALERT_ACTIVE_SINCE)
}
DECLARED: Final[Mapping[str, Metric]] = {metric.name: metric for metric in METRICS} | STATISTIC_METRICS
# These say what was in the time range, also of VMs that have ended since.
TABLES_OF_THE_PAST: Final = {"Top VMs", "vCPUs"}
RECORDING: Final = DASHBOARDS.parent / "alerts" / "kvm-notify-recording.rules.yml"
# What is recorded, and from what.
RECORDED: Final[Mapping[str, str]] = {
    rule["record"]: rule["expr"] for group in yaml.safe_load(RECORDING.read_text())["groups"] for rule in group["rules"]
}


def find_labels_of(name: str) -> frozenset[str]:
    """Return a metric's labels without those of its target; raises ValueError for one that nobody exports."""
    if name in PROMETHEUS_OWN:
        return PROMETHEUS_OWN[name]
    if name in RECORDED:
        return frozenset(find_labels(RECORDED[name], find_labels_of))
    if name not in DECLARED:
        raise ValueError(f"no metric {name or 'without a name'}")
    return frozenset(DECLARED[name].labels)


def check_rates_of_counters(dashboard: Json) -> Iterator[str]:
    """rate() and increase() are of counters that are declared as such."""
    for place, call in find_calls(dashboard):
        if call.func.name in {"rate", "irate", "increase"}:
            for selector in find_selectors(str(call)):
                if DECLARED[selector.metric].type is not MetricType.COUNTER:
                    yield f"{place}: {selector.metric} is no counter"


def check_labels(dashboard: Json) -> Iterator[str]:
    """Only metrics and labels that are exported are asked for, grouped by, joined on and brought along."""
    for place, expr in find_expressions(dashboard):
        try:
            find_labels(expr, find_labels_of)
        except ValueError as err:
            yield f"{place}: {err}: {expr}"


def check_joins(dashboard: Json) -> Iterator[str]:
    """What is brought along comes from one series at most, whatever the target exports: else the query fails."""
    for place, expr in find_expressions(dashboard, variables=False):
        for node in walk_parsed(expr):
            if isinstance(node, ast.BinaryExpr) and node.modifier and node.modifier.group_labels is not None:
                keys = set(node.modifier.matching.labels) if node.modifier.matching else set()
                if not {"job", "instance"} <= keys:
                    yield f"{place}: joined without job and instance: {node}"
                if not _is_single(node.rhs, keys):
                    yield f"{place}: the right side is not aggregated by what it is joined on: {node.rhs}"


def _is_single(expr: ast.Expr, keys: set[str]) -> bool:
    """Tell whether ``expr`` has one series at most for each set of values of ``keys``."""
    if not isinstance(expr, ast.AggregateExpr) or expr.modifier is None:
        return False
    by = set(expr.modifier.labels)
    if str(expr.op) == "count_values":
        return by == keys  # one value for each
    return by == keys and (str(expr.op) != "topk" or str(expr.param) == "1")


def check_variables_are_used(dashboard: Json) -> Iterator[str]:
    """No variable is dead, and none is used that is not there."""
    names = [v["name"] for v in dashboard["templating"]["list"]]
    used: set[str] = set()
    for text in _find_texts({**dashboard, "templating": {}}):
        used |= find_variables(text)
    for variable in find_query_variables(dashboard):
        used |= find_variables(variable["query"]["query"]) - {variable["name"]} | {"datasource"}
    in_links = {"__url_time_range"}
    for name in names:
        if name not in used:
            yield f"variable {name} is not used"
    for name in used - set(names) - GLOBALS - in_links:
        yield f"there is no variable {name}"


def check_panel_ids(dashboard: Json) -> Iterator[str]:
    """Every panel and row has an id of its own."""
    ids = [panel["id"] for row in dashboard["panels"] for panel in (row, *row.get("panels", ()))]
    for number in sorted({number for number in ids if ids.count(number) > 1}):
        yield f"id {number} twice"


def check_places(dashboard: Json) -> Iterator[str]:
    """No panel lies on another or beside the grid of 24 columns."""
    for panels in (dashboard["panels"], *(row.get("panels", []) for row in dashboard["panels"])):
        yield from _check_grid(panels)


def _check_grid(panels: list[Json]) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            yield f"{panel['title']}: beside the grid"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in taken:
                    yield f"{panel['title']} lies on {taken[x, y]}"
                    return
                taken[x, y] = panel["title"]


def check_tables(dashboard: Json) -> Iterator[str]:
    """A table shows every label that its queries give, and no column that none gives."""
    for panel in find_panels(dashboard):
        if panel["type"] != "table":
            continue
        organize = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
        values = {f"Value #{target['refId']}" for target in panel["targets"]}
        values = values if len(values) > 1 else {"Value"}
        labels: set[str] = set()
        for target in panel["targets"]:
            labels |= find_labels(substitute(target["expr"], VALUES), find_labels_of)
        for field in sorted((values | labels | {"Time"}) ^ {*organize["renameByName"], *organize["excludeByName"]}):
            yield f"{panel['title']}: column {field} is given or shown, but not both"
        titles = {*organize["renameByName"].values(), ".*"}
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["options"] not in titles:
                yield f"{panel['title']}: no column {override['matcher']['options']}"
        for sort in panel["options"]["sortBy"]:
            if sort["displayName"] not in titles:
                yield f"{panel['title']}: sorted by {sort['displayName']}, which is no column"


def check_zeros(dashboard: Json) -> Iterator[str]:
    """What is absent is not painted as a number."""
    for panel in find_panels(dashboard):
        defaults = panel["fieldConfig"]["defaults"]
        mappings = [defaults.get("mappings", [])]
        for override in panel["fieldConfig"]["overrides"]:
            mappings += [p["value"] for p in override["properties"] if p["id"] == "mappings"]
        kinds = [mapping["type"] for found in mappings for mapping in found]
        if "special" in kinds:  # null, NaN, empty
            yield f"{panel['title']}: maps what is not there to a value"
        if defaults.get("custom", {}).get("spanNulls", False) is not False:
            yield f"{panel['title']}: draws a line over gaps"
        if defaults.get("noValue") == "0" or any("vector(0)" in t["expr"] for t in panel["targets"]):
            yield f"{panel['title']}: shows 0 for what is not there"


def check_tables_of_now(dashboard: Json) -> Iterator[str]:
    """A table of now has no rows of what is gone: a query over the time range is joined with a series of now."""
    for panel in find_panels(dashboard):
        if panel["type"] != "table" or panel["title"] in TABLES_OF_THE_PAST:
            continue
        for target in panel["targets"]:
            for expr in walk_parsed(substitute(target["expr"], VALUES))[:1]:
                if not _is_of_now(expr):
                    yield f"{panel['title']}: also shows what is gone: {target['expr']}"


def _is_of_now(expr: object) -> bool:
    """Tell whether each series of ``expr`` has one without a range beside it."""
    match expr:
        case ast.BinaryExpr():
            sides = [_is_of_now(expr.lhs), _is_of_now(expr.rhs)]
            operator = str(expr.op)
            return all(sides) if operator == "or" else sides[0] if operator == "unless" else any(sides)
        case ast.AggregateExpr() | ast.ParenExpr() | ast.UnaryExpr():
            return _is_of_now(expr.expr)
        case ast.Call():
            return any(_is_of_now(argument) for argument in expr.args)
        case _:
            return isinstance(expr, ast.VectorSelector)


def check_unknown_is_neutral(dashboard: Json) -> Iterator[str]:
    """Null and no data, which have the base's colour, are grey; the colours of health begin at a known 0."""
    for panel in find_panels(dashboard):
        found = [panel["fieldConfig"]["defaults"]["thresholds"]]
        for override in panel["fieldConfig"]["overrides"]:
            found += [p["value"] for p in override["properties"] if p["id"] == "thresholds"]
        for base, *steps in (thresholds["steps"] for thresholds in found):
            if base != {"color": NEUTRAL, "value": None}:
                yield f"{panel['title']}: what is not known is {base['color']}"
            if not steps or steps[0]["value"] != 0:
                yield f"{panel['title']}: 0 has the colour of what is not known"


def _find_texts(part: Any) -> Iterator[str]:  # noqa: ANN401 - any part of a JSON file
    if isinstance(part, str):
        # A link's values come from the row that was clicked, not from a variable.
        yield re.sub(r"\$\{__(?:data|field)\.[^}]*\}", "", part)
    elif isinstance(part, list | dict):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _find_texts(inner)


OWN_RULES: Final[tuple[Rule, ...]] = (
    check_rates_of_counters,
    check_labels,
    check_joins,
    check_variables_are_used,
    check_panel_ids,
    check_places,
    check_tables,
    check_zeros,
    check_tables_of_now,
    check_unknown_is_neutral,
)
