"""Every question that the dashboards ask Prometheus, with Grafana's variables replaced by values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Json = dict[str, Any]

DASHBOARDS: Final = Path(__file__).parents[2] / "grafana" / "dashboards"
# ``$name``, ``${name}``, ``${name:format}``; a ``$1`` is for label_replace.
VARIABLE: Final = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::\w+)?\})")
_LABEL_VALUES: Final = re.compile(r"label_values\((?:(?P<expr>.+),\s*)?(?P<label>\w+)\)")
_QUERY_RESULT: Final = re.compile(r"query_result\((?P<expr>.+)\)")


@dataclass(frozen=True, slots=True)
class Query:
    """One question.

    ``place`` is the panel's title, ``variable NAME`` or ``annotation NAME``. ``label`` is that of a label_values().
    ``instant`` is how Grafana asks: at one point in time, or over the time range.
    """

    dashboard: str
    place: str
    expr: str
    instant: bool = False
    label: str = ""

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.place}: {self.expr}"


def read_dashboards() -> list[Json]:
    """Read the files that Grafana imports."""
    return [json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))]


def find_queries(
    *,
    job: str = ".+",
    instance: str = ".+",
    vm: str = "5107a7ed-0000-4000-8000-000000000002",
    rate_interval: str = "1m",
    interval: str = "15s",
    range_seconds: int = 3600,
) -> list[Query]:
    """Find all queries of the files; ``job`` and ``instance`` are regular expressions, ``vm`` is one VM's label.

    The default VM is the one of the demo that gets stuck.
    """
    values = {
        "datasource": "prometheus",
        "job": job,
        "instance": instance,
        "vm": vm,
        "__rate_interval": rate_interval,
        "__interval": interval,
        "__range": f"{range_seconds}s",
        "__range_s": str(range_seconds),
    }
    return [query for dashboard in read_dashboards() for query in find_dashboard_queries(dashboard, values)]


def find_dashboard_queries(dashboard: Json, values: Mapping[str, str]) -> Iterator[Query]:
    """Yield the queries of one dashboard: of its variables, its annotations and its panels."""
    uid = dashboard["uid"]
    for variable in find_query_variables(dashboard):
        expr, label = split_variable_query(variable["query"]["query"])
        instant = not label
        yield Query(uid, f"variable {variable['name']}", substitute(expr, values), instant, label)
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield Query(uid, f"annotation {annotation['name']}", substitute(annotation["expr"], values))
    for panel in find_panels(dashboard):
        for target in panel.get("targets", ()):
            yield Query(uid, panel["title"], substitute(target["expr"], values), target.get("instant", False))


def find_panels(dashboard: Json) -> list[Json]:
    """Find the panels, those in collapsed rows among them, without the rows."""
    nested = [panel for row in dashboard["panels"] for panel in (row, *row.get("panels", ()))]
    return [panel for panel in nested if panel["type"] != "row"]


def find_query_variables(dashboard: Json) -> list[Json]:
    """Find the variables whose values Prometheus gives."""
    return [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def split_variable_query(query: str) -> tuple[str, str]:
    """Return the PromQL in a variable's query, and the label if that is what it asks for; else raise ValueError."""
    if match := _LABEL_VALUES.fullmatch(query):
        return match["expr"] or f'{{{match["label"]}!=""}}', match["label"]
    if match := _QUERY_RESULT.fullmatch(query):
        return match["expr"], ""
    raise ValueError(f"neither label_values() nor query_result(): {query}")


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Return ``text`` with its variables replaced; raises KeyError for one without a value."""
    return VARIABLE.sub(lambda match: values[match[1] or match[2]], text)


def find_variables(text: str) -> set[str]:
    """Find the names of the variables in a text."""
    return {match[1] or match[2] for match in VARIABLE.finditer(text)}
