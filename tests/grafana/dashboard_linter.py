"""The rules of grafana/dashboard-linter: each yields what is wrong with a dashboard.

They are written anew after its documentation (docs/rules) and carry its names. Where it looks at some kinds of panels
only, these look at all but rows, and at the queries of annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import promql_parser as ast

from tests.grafana.dashboard_queries import (
    Json,
    find_dashboard_queries,
    find_panels,
    find_query_variables,
    split_variable_query,
)
from tests.grafana.promql import walk

Rule = Callable[[Json], Iterator[str]]

# Those of Grafana's units (packages/grafana-data/src/valueFormats/categories.ts) that are in use.
UNITS: Final = {"none", "string", "short", "percentunit", "s", "cps", "locale", "si:/h"} | {
    *("dateTimeAsIso", "dateTimeAsIsoNoDateIfToday", "dateTimeFromNow"),
}
# Whole numbers that no expression has by chance: so a range can be told from one that was written out.
RATE_INTERVAL_SECONDS: Final = 7919
VALUES: Final = {
    "datasource": "prometheus",
    "job": "$job",
    "instance": "$instance",
    "vm": "$vm",
    "__rate_interval": f"{RATE_INTERVAL_SECONDS}s",
    "__range": "7907s",
    "__range_s": "7907",
}


def check_datasource_variable(dashboard: Json) -> Iterator[str]:
    """template-datasource-rule"""
    found = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    if [v["name"] for v in found] != ["datasource"] or found[0]["query"] != "prometheus":
        yield "no variable datasource for prometheus, or more than one"
    elif found[0]["label"] != "Data source":
        yield "the variable datasource is not labelled Data source"


def check_job_variable(dashboard: Json) -> Iterator[str]:
    """template-job-rule"""
    yield from _check_target_variable(dashboard, "job", "Job")


def check_instance_variable(dashboard: Json) -> Iterator[str]:
    """template-instance-rule"""
    yield from _check_target_variable(dashboard, "instance", "Instance")


def _check_target_variable(dashboard: Json, name: str, label: str) -> Iterator[str]:
    wanted = {"type": "query", "label": label, "multi": True, "allValue": ".+"}
    found: Json = next((v for v in dashboard["templating"]["list"] if v["name"] == name), {})
    for key, value in wanted.items():
        if found.get(key) != value:
            yield f"variable {name}: {key} is {found.get(key)!r}, not {value!r}"
    if found.get("datasource", {}).get("uid") != "${datasource}":
        yield f"variable {name} does not use the data source that was chosen"


def check_variable_queries(dashboard: Json) -> Iterator[str]:
    """template-label-promql-rule"""
    for variable in find_query_variables(dashboard):
        try:
            split_variable_query(variable["query"]["query"])
        except ValueError as err:
            yield str(err)


def check_variable_refresh(dashboard: Json) -> Iterator[str]:
    """template-on-time-change-reload-rule"""
    for variable in find_query_variables(dashboard):
        if variable["refresh"] != 2:
            yield f"variable {variable['name']} is not read again when the time range changes"


def check_datasources(dashboard: Json) -> Iterator[str]:
    """panel-datasource-rule"""
    for panel in find_panels(dashboard):
        for part in (panel, *panel.get("targets", ())):
            if part.get("datasource") != {"type": "prometheus", "uid": "${datasource}"}:
                yield f"{panel['title']}: not the data source that was chosen"


def check_titles(dashboard: Json) -> Iterator[str]:
    """panel-title-description-rule"""
    for panel in find_panels(dashboard):
        if not panel.get("title") or not panel.get("description"):
            yield f"panel {panel['id']}: no title or no description"


def check_units(dashboard: Json) -> Iterator[str]:
    """panel-units-rule"""
    for panel in find_panels(dashboard):
        units = [panel["fieldConfig"]["defaults"].get("unit")]
        for override in panel["fieldConfig"]["overrides"]:
            units += [p["value"] for p in override["properties"] if p["id"] == "unit"]
        if wrong := [str(unit) for unit in units if unit not in UNITS]:
            yield f"{panel['title']}: no or unknown units {wrong}"


def check_targets(dashboard: Json) -> Iterator[str]:
    """panel-no-targets-rule"""
    for panel in find_panels(dashboard):
        if not panel.get("targets"):
            yield f"{panel['title']}: no targets"


def check_promql(dashboard: Json) -> Iterator[str]:
    """target-promql-rule"""
    for place, expr in find_expressions(dashboard):
        try:
            ast.parse(expr)
        except ValueError as err:
            yield f"{place}: {err}: {expr}"


def check_rate_interval(dashboard: Json) -> Iterator[str]:
    """target-rate-interval-rule"""
    for place, call in find_calls(dashboard):
        if call.func.name in {"rate", "irate"}:
            for argument in call.args:
                seconds = argument.range.total_seconds() if isinstance(argument, ast.MatrixSelector) else None
                if seconds != RATE_INTERVAL_SECONDS:
                    yield f"{place}: {call.func.name}() not over $__rate_interval: {call}"


def check_job_matchers(dashboard: Json) -> Iterator[str]:
    """target-job-rule"""
    yield from _check_matchers(dashboard, "job")


def check_instance_matchers(dashboard: Json) -> Iterator[str]:
    """target-instance-rule"""
    yield from _check_matchers(dashboard, "instance")


def _check_matchers(dashboard: Json, label: str) -> Iterator[str]:
    for place, expr in find_expressions(dashboard, variables=False):
        for node in walk_parsed(expr):
            if isinstance(node, ast.VectorSelector):
                matchers = [(m.op, m.value) for m in node.matchers.matchers if m.name == label]
                # What is about no host has no such label.
                if matchers not in ([(ast.MatchOp.Re, f"${label}")], [(ast.MatchOp.Equal, "")]):
                    yield f'{place}: not {label}=~"${label}": {node}'


def check_counters(dashboard: Json) -> Iterator[str]:
    """target-counter-agg-rule"""
    for place, expr in find_expressions(dashboard, variables=False):
        counted = {
            str(argument.vector_selector)
            for node in walk_parsed(expr)
            if isinstance(node, ast.Call) and node.func.name in {"rate", "irate", "increase"}
            for argument in node.args
            if isinstance(argument, ast.MatrixSelector)
        }
        for node in walk_parsed(expr):
            is_counter = isinstance(node, ast.VectorSelector) and str(node.name).endswith("_total")
            if is_counter and str(node) not in counted:
                yield f"{place}: a counter without rate() or increase(): {node}"


def check_uneditable(dashboard: Json) -> Iterator[str]:
    """uneditable-dashboard-rule"""
    if dashboard.get("editable") is not False:
        yield "the dashboard is editable"


def find_expressions(dashboard: Json, *, variables: bool = True) -> Iterator[tuple[str, str]]:
    """Yield place and expression; the choice of a job cannot be limited to the job that was chosen."""
    for query in find_dashboard_queries(dashboard, VALUES):
        if variables or not query.place.startswith("variable "):
            yield query.place, query.expr


def walk_parsed(expr: str) -> list[ast.Expr]:
    """Return the parts of an expression; none of one that cannot be parsed, which is another rule's matter."""
    try:
        return list(walk(ast.parse(expr)))
    except ValueError:
        return []


def find_calls(dashboard: Json) -> Iterator[tuple[str, ast.Call]]:
    for place, expr in find_expressions(dashboard):
        for node in walk_parsed(expr):
            if isinstance(node, ast.Call):
                yield place, node


LINTER_RULES: Final[tuple[Rule, ...]] = (
    check_datasource_variable,
    check_job_variable,
    check_instance_variable,
    check_variable_queries,
    check_variable_refresh,
    check_datasources,
    check_titles,
    check_units,
    check_targets,
    check_promql,
    check_rate_interval,
    check_job_matchers,
    check_instance_matchers,
    check_counters,
    check_uneditable,
)
