"""Each rule about dashboards can complain: one that is broken in each of these ways is not let through."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.grafana import dashboard_linter as linter
from tests.grafana import dashboard_rules as rules
from tests.grafana.dashboard_linter import LINTER_RULES, Rule
from tests.grafana.dashboard_queries import Json, find_panels, read_dashboards
from tests.grafana.dashboard_rules import OWN_RULES


@pytest.fixture(params=read_dashboards(), ids=lambda dashboard: dashboard["uid"])
def dashboard(request: pytest.FixtureRequest) -> Json:
    found: Json = copy.deepcopy(request.param)
    return found


def panel_of(dashboard: Json, kind: str) -> Json:
    return next(panel for panel in find_panels(dashboard) if panel["type"] == kind)


def variable_of(dashboard: Json, name: str) -> Json:
    found: Json = next(v for v in dashboard["templating"]["list"] if v["name"] == name)
    return found


def set_in_variable(name: str, key: str, value: object) -> Callable[[Json], object]:
    return lambda d: variable_of(d, name).update({key: value})


def set_in_panel(kind: str, key: str, value: object) -> Callable[[Json], object]:
    return lambda d: panel_of(d, kind).update({key: value})


def set_expr(expr: str) -> Callable[[Json], object]:
    return lambda d: panel_of(d, "timeseries")["targets"][0].update(expr=expr)


ALL = 'job=~"$job", instance=~"$instance"'
MUTATIONS: list[tuple[Rule, str, Callable[[Json], object]]] = [
    (linter.check_datasource_variable, "renamed", set_in_variable("datasource", "name", "ds")),
    (linter.check_datasource_variable, "label", set_in_variable("datasource", "label", "Prometheus")),
    (linter.check_datasource_variable, "other kind", set_in_variable("datasource", "query", "loki")),
    (linter.check_datasource_variable, "gone", lambda d: d["templating"].update(list=d["templating"]["list"][1:])),
    (linter.check_job_variable, "gone", set_in_variable("job", "name", "jobs")),
    (linter.check_job_variable, "single", set_in_variable("job", "multi", False)),
    (linter.check_job_variable, "all", set_in_variable("job", "allValue", ".*")),
    (linter.check_job_variable, "label", set_in_variable("job", "label", "job")),
    (linter.check_job_variable, "kind", set_in_variable("job", "type", "custom")),
    (linter.check_job_variable, "datasource", set_in_variable("job", "datasource", {"uid": "prometheus"})),
    (linter.check_instance_variable, "single", set_in_variable("instance", "multi", False)),
    (linter.check_instance_variable, "all", set_in_variable("instance", "allValue", None)),
    (linter.check_variable_queries, "function", set_in_variable("job", "query", {"query": "values(up, job)"})),
    (linter.check_variable_refresh, "on load", set_in_variable("job", "refresh", 1)),
    (linter.check_datasources, "panel", set_in_panel("stat", "datasource", {"type": "prometheus", "uid": "abc"})),
    (linter.check_datasources, "target", lambda d: panel_of(d, "stat")["targets"][0].pop("datasource")),
    (linter.check_titles, "title", set_in_panel("table", "title", "")),
    (linter.check_titles, "description", set_in_panel("timeseries", "description", "")),
    (linter.check_units, "none", lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"].pop("unit")),
    (linter.check_units, "unknown", lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"].update(unit="exits")),
    (
        linter.check_units,
        "override",
        lambda d: panel_of(d, "table")["fieldConfig"]["overrides"].append(
            {"matcher": {"id": "byName", "options": "x"}, "properties": [{"id": "unit", "value": "sec"}]}
        ),
    ),
    (linter.check_targets, "gone", set_in_panel("stat", "targets", [])),
    (linter.check_promql, "open", set_expr("sum(")),
    (linter.check_promql, "empty", set_expr("")),
    (linter.check_rate_interval, "fixed", set_expr(f"sum(rate(kvm_host_notify_window_exits_total{{{ALL}}}[5m]))")),
    (
        linter.check_rate_interval,
        "range",
        set_expr(f"sum(rate(kvm_host_notify_window_exits_total{{{ALL}}}[$__range]))"),
    ),
    (linter.check_job_matchers, "none", set_expr('sum(kvm_host_vms{instance=~"$instance"})')),
    (linter.check_job_matchers, "equal", set_expr('sum(kvm_host_vms{job="$job", instance=~"$instance"})')),
    (linter.check_job_matchers, "fixed", set_expr('sum(kvm_host_vms{job=~"kvm", instance=~"$instance"})')),
    (linter.check_instance_matchers, "none", set_expr('sum(kvm_host_vms{job=~"$job"})')),
    (linter.check_counters, "bare", set_expr(f"sum(kvm_host_notify_window_exits_total{{{ALL}}})")),
    (linter.check_counters, "maximum", set_expr(f"max_over_time(kvm_exporter_warnings_total{{{ALL}}}[$__range])")),
    (linter.check_uneditable, "editable", lambda d: d.update(editable=True)),
    (linter.check_uneditable, "not said", lambda d: d.pop("editable")),
    (rules.check_rates_of_counters, "gauge", set_expr(f"rate(kvm_host_vms{{{ALL}}}[$__rate_interval])")),
    (rules.check_labels, "metric", set_expr(f"sum(kvm_host_vm{{{ALL}}})")),
    (rules.check_labels, "matcher", set_expr(f'sum(kvm_host_vms{{{ALL}, state="armed"}})')),
    (rules.check_labels, "by", set_expr(f"sum by (state) (kvm_host_vms{{{ALL}}})")),
    (
        rules.check_labels,
        "brought",
        set_expr(
            f"kvm_vm_vcpus{{{ALL}}} * on (job, instance, vm) group_left (owner) "
            f"topk by (job, instance, vm) (1, kvm_vm_info{{{ALL}}})"
        ),
    ),
    (
        rules.check_joins,
        "not aggregated",
        set_expr(f"kvm_vm_vcpus{{{ALL}}} * on (job, instance, vm) group_left (name) kvm_vm_info{{{ALL}}}"),
    ),
    (
        rules.check_joins,
        "two of each",
        set_expr(
            f"kvm_vm_vcpus{{{ALL}}} * on (job, instance, vm) group_left (name) "
            f"topk by (job, instance, vm) (2, kvm_vm_info{{{ALL}}})"
        ),
    ),
    (
        rules.check_joins,
        "no instance",
        set_expr(f"kvm_vm_vcpus{{{ALL}}} * on (vm) group_left (name) topk by (vm) (1, kvm_vm_info{{{ALL}}})"),
    ),
    (
        rules.check_variables_are_used,
        "dead",
        lambda d: d["templating"]["list"].append({"name": "cluster", "type": "custom"}),
    ),
    (rules.check_variables_are_used, "unknown", set_expr(f'sum(kvm_host_vms{{{ALL}, protection="$state"}})')),
    (rules.check_panel_ids, "twice", lambda d: find_panels(d)[0].update(id=find_panels(d)[1]["id"])),
    (rules.check_places, "on another", lambda d: find_panels(d)[1]["gridPos"].update(find_panels(d)[0]["gridPos"])),
    (
        rules.check_places,
        "in a collapsed row",
        lambda d: next(row for row in d["panels"] if row.get("panels"))["panels"][0]["gridPos"].update(x=23),
    ),
    (rules.check_places, "beside", lambda d: find_panels(d)[0]["gridPos"].update(x=23)),
    (
        rules.check_tables,
        "label not shown",
        lambda d: panel_of(d, "table")["targets"].append(
            {"refId": "Z", "expr": f"max by (kvm_module, lockdown) (kvm_host_info{{{ALL}}})"}
        ),
    ),
    (
        rules.check_tables,
        "column not given",
        lambda d: panel_of(d, "table")["transformations"][-1]["options"]["renameByName"].update(customer="Customer"),
    ),
    (rules.check_tables, "sorted", lambda d: panel_of(d, "table")["options"].update(sortBy=[{"displayName": "x"}])),
    (
        rules.check_tables,
        "override",
        lambda d: panel_of(d, "table")["fieldConfig"]["overrides"][1]["matcher"].update(options="x"),
    ),
    (
        rules.check_zeros,
        "null as zero",
        lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"]["mappings"].append(
            {"type": "special", "options": {"match": "null", "result": {"text": "0"}}}
        ),
    ),
    (
        rules.check_zeros,
        "gaps",
        lambda d: panel_of(d, "timeseries")["fieldConfig"]["defaults"]["custom"].update(spanNulls=True),
    ),
    (rules.check_zeros, "vector", set_expr(f"sum(kvm_host_vms{{{ALL}}}) or vector(0)")),
    (rules.check_zeros, "no value", lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"].update(noValue="0")),
    (
        rules.check_tables_of_now,
        "range",
        lambda d: panel_of(d, "table")["targets"][0].update(
            expr=f"sum(increase(kvm_vcpu_exits_total{{{ALL}}}[$__range]))"
        ),
    ),
    (
        rules.check_tables_of_now,
        "either",
        lambda d: panel_of(d, "table")["targets"][0].update(
            expr=f"kvm_host_vms{{{ALL}}} or last_over_time(kvm_host_vms{{{ALL}}}[$__range])"
        ),
    ),
    (
        rules.check_unknown_is_neutral,
        "green",
        lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"]["thresholds"]["steps"][0].update(color="green"),
    ),
    (
        rules.check_unknown_is_neutral,
        "zero",
        lambda d: panel_of(d, "stat")["fieldConfig"]["defaults"]["thresholds"]["steps"].pop(1),
    ),
    (
        rules.check_unknown_is_neutral,
        "column",
        lambda d: panel_of(d, "table")["fieldConfig"]["overrides"].append(
            {
                "matcher": {"id": "byName", "options": "x"},
                "properties": [{"id": "thresholds", "value": {"steps": [{"color": "green", "value": None}]}}],
            }
        ),
    ),
]


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [pytest.param(rule, mutate, id=f"{rule.__name__}-{name}") for rule, name, mutate in MUTATIONS],
)
def test_rule_complains(rule: Rule, mutate: Callable[[Json], object], dashboard: Json) -> None:
    mutate(dashboard)
    assert list(rule(dashboard)) != []


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in MUTATIONS} == {*LINTER_RULES, *OWN_RULES}
