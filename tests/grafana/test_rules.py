"""The rules for Prometheus: promtool accepts them and their unit tests pass, and what they use is what the agent gives.

A unit test that cannot fail proves nothing. So each rule is broken here in the ways that people break rules (another
threshold, no ``for``, a join without the VM), and its unit tests have to notice.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import promql_parser as ast
import pytest
import yaml

from exporter.build_info import BuildInfo
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.metrics import METRICS
from exporter.prometheus.selection import CollectorSettings
from exporter.prometheus.vm_series import VcpuSeries
from exporter.stalls.verdicts import MonitorReport, State, VcpuReport
from kvm.model import NOTIFY_WINDOW_EXITS, Protection, Snapshot, SourceReport
from kvm.simulated.host import SimulatedHost
from tests.documents import ALL_DOCUMENTS, DOCS, find_anchors, find_blocks, find_blocks_anywhere, find_table
from tests.grafana.promql import TARGET_LABELS, find_joins, find_labels, find_selectors, walk
from tests.reports import USAGE, make_report, with_figures

ROOT: Final = Path(__file__).parents[2]
DIRECTORY: Final = ROOT / "grafana" / "alerts"
RULE_FILES: Final = sorted(DIRECTORY.glob("*.rules.yml"))
TEST_FILES: Final = sorted((DIRECTORY / "tests").glob("*.test.yml"))
RUNBOOK: Final = DOCS / "runbook.md"
RUNBOOK_URL: Final = "https://github.com/kvm-notify-exporter/kvm-notify-exporter/blob/main/docs/runbook.md#"
PACKAGES: Final = {"promtool": "prometheus", "amtool": "prometheus-alertmanager"}
# Drops labels that a target may have brought along under the names of an owner's, and mostly has not.
DROPPED_OWNER: Final = re.compile(r"max without \((name, display_name, )?project, vm_namespace, (uuid, )?vmm\)")
# What Prometheus adds to a scrape.
PROMETHEUS_METRICS: Final = {"up": frozenset[str]()}


class Rule(NamedTuple):
    """A rule: ``name`` is an alert's, or that of the series that it records; ``body`` is what the file says."""

    file: Path
    group: str
    name: str
    expr: str
    body: dict[str, Any]

    @property
    def is_alert(self) -> bool:
        return "alert" in self.body


def read_document(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    return document


def read_rules(file: Path) -> Iterator[Rule]:
    for group in read_document(file)["groups"]:
        for body in group["rules"]:
            yield Rule(file, group["name"], body.get("alert") or body["record"], body["expr"], body)


RULES: Final = [rule for file in RULE_FILES for rule in read_rules(file)]
ALERTS: Final = [rule for rule in RULES if rule.is_alert]
RECORDED: Final = {rule.name: rule for rule in RULES if not rule.is_alert}
DOCUMENTS: Final = {file: read_document(file) for file in (*RULE_FILES, *TEST_FILES)}
UNIT_TESTS: Final = [test for file in TEST_FILES for test in DOCUMENTS[file]["tests"]]


def by_name(value: object) -> str | None:
    return value.name if isinstance(value, Rule | Path) else None


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed; Debian has it in {PACKAGES[name]}")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=False)


def run_promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_tool("promtool", *arguments)


def find_series_labels(expr: str) -> set[str]:
    """The labels of what an expression of ours gives; raises ValueError where it asks for what nobody makes."""
    return find_labels(DROPPED_OWNER.sub("", expr), find_metric_labels, target_labels=())


def find_metric_labels(metric: str) -> set[str]:
    if metric in RECORDED:
        return find_series_labels(RECORDED[metric].expr)
    declared = PROMETHEUS_METRICS | {declared.name: frozenset(declared.labels) for declared in METRICS}
    if metric not in declared:
        raise ValueError(f"nobody makes {metric}")
    return {*declared[metric], *TARGET_LABELS}


@pytest.mark.parametrize("file", RULE_FILES, ids=by_name)
def test_promtool_accepts_the_rules(file: Path) -> None:
    run = run_promtool("check", "rules", "--lint=all", "--lint-fatal", file)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("file", TEST_FILES, ids=by_name)
def test_unit_tests_of_rules_pass(file: Path) -> None:
    run = run_promtool("test", "rules", file)
    assert run.returncode == 0, run.stdout + run.stderr


def test_names_are_unique_and_as_prometheus_wants_them() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        if rule.is_alert:
            assert re.fullmatch(r"Kvm([A-Z][a-z]+)+", rule.name)
        else:
            assert re.fullmatch(r"(vm|instance|microcode):kvm_[a-z_]+:[a-z]+(\d+[mhd])?", rule.name)


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_an_alert_says_what_a_person_needs(rule: Rule) -> None:
    assert rule.body["labels"].keys() == {"severity"}
    assert rule.body["labels"]["severity"] in {"page", "ticket"}
    assert rule.body["annotations"].keys() == {"summary", "description", "runbook_url"}
    texts = rule.body["annotations"]
    if "vm" in find_series_labels(rule.expr):
        assert "$labels.vm" in texts["summary"]
        for label in ("vm", "name", "display_name", "project", "vm_namespace", "vmm", "instance"):
            assert f"$labels.{label}" in texts["description"]
    elif "instance" in find_series_labels(rule.expr):
        assert "$labels.instance" in texts["summary"]


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_an_alert_has_its_place_in_the_runbook(rule: Rule) -> None:
    url = rule.body["annotations"]["runbook_url"]
    assert url == f"{RUNBOOK_URL}{rule.name.lower()}"
    assert find_anchors(RUNBOOK).count(rule.name.lower()) == 1, f"docs/runbook.md needs one heading {rule.name!r}"


def test_the_runbook_is_about_alerts_only() -> None:
    assert find_anchors(RUNBOOK) == ["runbook", *(rule.name.lower() for rule in sort_as_listed(ALERTS))]


def sort_as_listed(rules: list[Rule]) -> list[Rule]:
    """Sort alerts as docs/alerts.md lists them."""
    names = [name for name, _severity in find_listed_alerts()]
    return sorted(rules, key=lambda rule: names.index(rule.name))


def find_listed_alerts() -> list[tuple[str, str]]:
    """The alerts that docs/alerts.md lists, with their severity; each links to its place in the runbook."""
    listed = []
    for alert, severity, _says in find_table(DOCS / "alerts.md", "alert", "severity", "says"):
        link = re.fullmatch(r"\[(\w+)\]\(runbook\.md#(\w+)\)", alert)
        assert link, alert
        assert link[2] == link[1].lower()
        listed.append((link[1], severity))
    return listed


def find_sections() -> dict[str, str]:
    """What the runbook says of each alert."""
    parts = re.split(r"^## (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_the_runbook_says_what_it_means_how_to_confirm_it_and_what_to_do(rule: Rule) -> None:
    found = re.findall(r"^\*\*(Meaning|Confirm|Do)\b", find_sections()[rule.name], re.MULTILINE)
    assert found == ["Meaning", "Confirm", "Do"]


def test_the_runbook_asks_for_what_is_there() -> None:
    queries = find_blocks(RUNBOOK, "promql")
    assert len(queries) >= len(ALERTS)
    for query in [*queries, *find_document_queries()]:
        find_series_labels(query)


def find_document_queries() -> list[str]:
    """The queries of other documents, which their reader puts into Prometheus as they are."""
    return [block for text in ALL_DOCUMENTS if text != RUNBOOK for block in find_blocks(text, "promql")]


@pytest.mark.parametrize(
    ("name", "command"), [("prometheus", "promtool check config"), ("alertmanager", "amtool check-config")]
)
def test_configurations_in_the_documents_are_valid(name: str, command: str, tmp_path: Path) -> None:
    configurations = [block for block in find_blocks_anywhere("yaml") if block.startswith(f"# {name}.yml")]
    assert configurations
    for configuration in configurations:
        file = tmp_path / f"{name}.yml"
        file.write_text(configuration)
        run = run_tool(*command.split(), file)
        assert run.returncode == 0, f"{configuration}\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_a_rule_uses_what_is_there(rule: Rule) -> None:
    labels = find_series_labels(rule.expr)
    for text in rule.body.get("annotations", {}).values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
        for query in find_annotation_queries(text):
            find_series_labels(query)


def find_annotation_queries(text: str) -> list[str]:
    """What an annotation asks Prometheus, for an alert whose labels are all empty."""
    queries = re.findall(r"""query\s+\(printf\s+(["`])(.*?)\1""", text, re.DOTALL)
    assert len(queries) == len(re.findall(r"\bquery\b", text))
    return [query.replace("%q", '""') for _quote, query in queries]


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_an_annotation_asks_about_one_host_only(rule: Rule) -> None:
    """It is asked once for each alert: about a whole fleet, it takes seconds each."""
    for text in rule.body["annotations"].values():
        for query in find_annotation_queries(text):
            for selector in find_selectors(query):
                assert {"job", "instance"} <= selector.labels, f"{selector.metric} of every host"


def find_seconds(interval: str) -> int:
    return int(interval[:-1]) * {"s": 1, "m": 60}[interval[-1]]


def test_groups_are_evaluated_as_often_as_what_reads_them_needs() -> None:
    """A stall pages after 30 s; sums count a sample a minute; and no sample is found for longer than 5 minutes."""
    for file in RULE_FILES:
        for group in DOCUMENTS[file]["groups"]:
            seconds = find_seconds(group["interval"])
            recorded = {body["record"] for body in group["rules"] if "record" in body}
            if any(body.get("alert") == "KvmVcpuNoForwardProgress" for body in group["rules"]):
                assert seconds <= 15
            if recorded:
                assert seconds < 300
            if "vm:kvm_vm_notify_window_exits:rate5m" in recorded:
                assert seconds == 60


def test_the_rules_of_vms_hold_no_more_samples_than_they_must() -> None:
    """A subquery holds all samples of all series at once; those over hosts and microcodes are few."""
    for rule in RULES:
        for node in walk(ast.parse(rule.expr)):
            if isinstance(node, ast.SubqueryExpr):
                assert not any(asked.metric.startswith(("vm:", "kvm_")) for asked in find_selectors(str(node)))


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_where_the_name_is_not_known_no_other_is_in_its_place(rule: Rule) -> None:
    """Targets may bring the labels vm_namespace and project along, of the agent and not of the VM."""
    if "group_left" in rule.expr and "_info:unique" in rule.expr:
        _known, unknown = rule.expr.split("or on (job, instance, vm)")
        assert DROPPED_OWNER.match(unknown.strip())


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_a_join_is_on_the_host_and_cannot_fail(rule: Rule) -> None:
    for join in find_joins(rule.expr):
        if join.on is not None:
            assert {"job", "instance"} <= join.on, f"{join} would mix hosts"
        if join.grouped:
            assert join.on is not None
            assert ("vm" in join.on) == bool(
                {"name", "project", "vm_namespace"} & join.group_labels
            ) or not join.group_labels
    for node in walk(ast.parse(rule.expr)):
        if (
            isinstance(node, ast.BinaryExpr)
            and node.modifier
            and node.modifier.card == ast.VectorMatchCardinality.ManyToOne
        ):
            matching = node.modifier.matching
            assert matching is not None
            assert is_unique(node.rhs, set(matching.labels)), f"{node.rhs} may have two series for one of the left side"


def is_unique(expr: ast.Expr, on: set[str]) -> bool:
    """Whether an expression has one series at most for each value of the labels ``on``."""
    if isinstance(expr, ast.ParenExpr):
        return is_unique(expr.expr, on)
    if isinstance(expr, ast.AggregateExpr) and expr.modifier is not None:
        return expr.modifier.type == ast.AggModifierType.By and set(expr.modifier.labels) <= on
    return isinstance(expr, ast.VectorSelector) and str(expr.name).endswith(":unique")


def test_only_one_rule_depends_on_the_name_of_the_job() -> None:
    dependent = {rule.name for rule in RULES for selector in find_selectors(rule.expr) if "job" in selector.labels}
    assert dependent == {"instance:kvm_exporter_scraped:bool"}


def test_rules_do_without_vcpu_series_where_they_can() -> None:
    """An agent with --vcpu-series=none has these."""
    used = {selector.metric for rule in RULES for selector in find_selectors(rule.expr)}
    vcpu_series = {metric for metric in used if metric.startswith("kvm_vcpu_")}
    assert vcpu_series == {
        "kvm_vcpu_drill",
        "kvm_vcpu_no_forward_progress",
        "kvm_vcpu_notify_context_invalid_exits_total",
    }


def test_rules_over_a_fleet_need_what_a_fleet_keeps_and_no_more() -> None:
    for rule in RULES:
        if rule.file.name == "kvm-notify-fleet.rules.yml":
            for selector in find_selectors(rule.expr):
                assert selector.metric.startswith(("instance:", "microcode:"))


@pytest.mark.parametrize("rule", ALERTS, ids=by_name)
def test_an_alert_is_seen_to_fire_and_not_to_fire(rule: Rule) -> None:
    cases = [case for test in UNIT_TESTS for case in test.get("alert_rule_test", []) if case["alertname"] == rule.name]
    fired = [alert for case in cases for alert in case.get("exp_alerts") or []]
    assert fired
    for alert in fired:
        assert alert["exp_annotations"].keys() == rule.body["annotations"].keys()
    assert any(not case.get("exp_alerts") for case in cases)


@pytest.mark.parametrize("rule", RECORDED.values(), ids=by_name)
def test_a_recorded_series_is_seen(rule: Rule) -> None:
    expressions = [
        case["expr"] for test in UNIT_TESTS for case in test.get("promql_expr_test", []) if case.get("exp_samples")
    ]
    assert any(rule.name in {selector.metric for selector in find_selectors(expr)} for expr in expressions)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A rule that is broken in one place: ``old``, a regular expression, becomes ``new`` in the rule's ``part``."""

    rule: str
    old: str
    new: str = ""
    part: str = "expr"


REST: Final = r"(?s)\s+{}.*"
MUTANTS: Final = [
    Mutant("instance:kvm_host_info:unique", "> 1", "> 9"),
    Mutant("instance:kvm_host_info:unique", "by .job, instance.", "by (job)"),
    Mutant("instance:kvm_host_info:unique", "without .kernel, ", "without ("),
    Mutant("instance:kvm_host_vcpus_armed:sum", '"armed"', '"off"'),
    Mutant("instance:kvm_host_vcpus_armed:sum", REST.format("or on")),
    Mutant("instance:kvm_host_vcpus_armed:sum", "> 0", ">= 0"),
    Mutant("instance:kvm_host_notify_window_exits:rate5m", REST.format("and on")),
    Mutant("instance:kvm_host_notify_window_exits:rate5m", r"rate\((\w+)\[5m\]\)", r"\1"),
    Mutant("vm:kvm_vm_notify_window_exits:rate5m", "> 0"),
    Mutant("vm:kvm_vm_notify_window_exits:rate5m", "rate", "delta"),
    Mutant("vm:kvm_vm_info:notified", "and on .job, instance, vm. vm:.*(?=.)", ")"),
    Mutant("vm:kvm_vm_info:notified", "on .job, instance, vm.", "on (vm)"),
    Mutant("vm:kvm_vm_info:notified", "max without .pid.", ""),
    Mutant("vm:kvm_vm_notify_window_exits:increase1h", REST.format("and on")),
    Mutant("vm:kvm_vm_notify_window_exits:increase1h", "60", "1"),
    Mutant("vm:kvm_vm_notify_window_exits:rise1h", ">= 15", ">= 1"),
    Mutant("vm:kvm_vm_notify_window_exits:rise1h", "/ 24"),
    Mutant("vm:kvm_vm_notify_window_exits:rise1h", r"\n\s+or\n\s+vm:\S+"),
    Mutant("vm:kvm_vm_notify_window_exits:rise1h", r"\n\s+- [^\n]+"),
    Mutant("vm:kvm_vm_notify_lost_seconds:rate5m", ", window_cycles"),
    Mutant("vm:kvm_vm_notify_lost_seconds:rate5m", "> bool 0"),
    Mutant("instance:kvm_vm_source_info:count", "count", "max"),
    Mutant("instance:kvm_vm_source_info:count", ", source"),
    Mutant("vm:kvm_vm_notify_lost_seconds:rate5m", r"job, instance, window_cycles", "window_cycles"),
    Mutant("instance:kvm_vm_notify_lost_seconds:rate5m", "sum", "max"),
    Mutant("instance:kvm_vms_with_notify_exits:count1d", "count without", "sum without"),
    Mutant("microcode:kvm_host_notify_window_exits:rate5m", "sum", "max"),
    Mutant("microcode:kvm_host_notify_window_exits:rate5m", r"max by .job, instance, [^)]+\)"),
    Mutant("microcode:kvm_host_vcpus_armed:sum", "sum by", "max by"),
    Mutant("microcode:kvm_host_vcpus_armed:sum", r"max by .job, instance, [^)]+\)"),
    Mutant("microcode:kvm_notify_exits_per_armed_vcpu_day:avg1d", "86400", "3600"),
    Mutant("microcode:kvm_notify_exits_per_armed_vcpu_day:avg1d", r"vcpus_armed:sum\[1d\]", "vcpus_armed:sum[1h]"),
    Mutant("instance:kvm_notify_exits_per_armed_vcpu_day:avg1d", "86400", "3600"),
    Mutant("microcode:kvm_armed_vcpu_days:sum1d", "600", "60"),
    Mutant("instance:kvm_armed_vcpu_days:sum1d", "600", "60"),
    Mutant("microcode:kvm_hosts_with_notify_exits:count1d", "> 1", "> 0"),
    Mutant("microcode:kvm_hosts_with_notify_exits:count1d", r"max by .job, instance, [^)]+\)"),
    Mutant("microcode:kvm_hosts_with_notify_exits:count1d", r"(?s)\s+and on.*>= 2"),
    Mutant("vm:kvm_vm_info:unique", "> 1", "> 9"),
    Mutant("vm:kvm_vm_info:unique", r"(?m)^max without .pid. .kvm_vm_info.$", "kvm_vm_info"),
    Mutant("vm:kvm_vm_info:unique", "by .job, instance, vm.", "by (job, vm)"),
    Mutant("vm:kvm_stalled_vm_info:unique", "> 1", "> 9"),
    Mutant("vm:kvm_stalled_vm_info:unique", r"\Amax without .pid. ", "max without (name) "),
    Mutant("vm:kvm_stalled_vm_info:unique", "count by .job, instance, vm.", "count by (job, vm)"),
    Mutant("vm:kvm_stalled_vm_info:unique", " or kvm_vcpu_drill"),
    Mutant("KvmVcpuNoForwardProgress", r"on .job, instance, vm. group_left", "on (vm) group_left"),
    Mutant("KvmVcpuNoForwardProgress", REST.format("or on")),
    Mutant("KvmVcpuNoForwardProgress", DROPPED_OWNER.pattern),
    Mutant("KvmVcpuNoForwardProgress", "> 0", "> 1"),
    Mutant("KvmVcpuNoForwardProgress", '"yes"', '""'),
    Mutant("KvmVcpuNoForwardProgress", "kvm_vcpu_drill", "kvm_vcpu_no_forward_progress"),
    Mutant("KvmVcpuNoForwardProgress", "> 0", ">= 0"),
    Mutant("KvmVcpuNoForwardProgress", ".+", "0s", "for"),
    Mutant("KvmVcpuNoForwardProgress", ".+", "1m", "for"),
    Mutant("KvmVcpuNoForwardProgress", ".+", "1s", "keep_firing_for"),
    Mutant("vm:kvm_vcpu_notify_context_invalid_exits:increase1h", r"offset 1h"),
    Mutant("vm:kvm_vcpu_notify_context_invalid_exits:increase1h", r"\[1d\]", "[5m]"),
    Mutant("vm:kvm_vcpu_notify_context_invalid_exits:increase1h", r"(?s)unless\s+last_over_time.*?\)"),
    Mutant("vm:kvm_vcpu_notify_context_invalid_exits:increase1h", r"increase\((\w+)\[1h\]\)", r"\1 unless \1"),
    Mutant("vm:kvm_vcpu_notify_context_invalid_exits:increase1h", r"without .vcpu.", "without ()"),
    Mutant("KvmVcpuContextInvalid", r"on .job, instance, vm. group_left", "on (instance) group_left"),
    Mutant("KvmVcpuContextInvalid", REST.format("or on")),
    Mutant("KvmVcpuContextInvalid", DROPPED_OWNER.pattern),
    Mutant("KvmVmNotifyExitsRising", "> 10", "> 0"),
    Mutant("KvmVmNotifyExitsRising", "> 10", "> 20"),
    Mutant("KvmVmNotifyExitsRising", r"on .job, instance, vm. group_left", "on (vm) group_left"),
    Mutant("KvmVmNotifyExitsRising", REST.format("or on")),
    Mutant("KvmVmNotifyExitsRising", DROPPED_OWNER.pattern),
    Mutant("KvmVmUnprotected", r"and on .job, instance. kvm_host_notify_supported == 1"),
    Mutant("KvmVmUnprotected", "supported == 1", "supported == 0"),
    Mutant("KvmVmUnprotected", '{state="off"} == 1', '{state="off"}'),
    Mutant("KvmVmUnprotected", ".+", "30m", "for"),
    Mutant("KvmVmUnprotected", r"(?s)\n  or on.*\n  \)\n", "\n"),
    Mutant("KvmVmUnprotected", DROPPED_OWNER.pattern),
    Mutant("KvmVmUnprotected", "count without", "max without"),
    Mutant("KvmVmUnprotected", "vm, state", "vm, state, project"),
    Mutant("KvmNotifyAgentBlind", "== 0", "== 1"),
    Mutant("KvmNotifyAgentBlind", ".+", "5m", "for"),
    Mutant("KvmNotifyAgentBlind", r"!~.over_budget.owners_pending.", '!="over_budget"'),
    Mutant("KvmNotifyAgentBlind", r"unless ignoring .reason.\s+kvm", "or kvm"),
    Mutant("KvmNotifyAgentBlind", r"unless ignoring .reason.\s+kvm", "unless on (job, instance) kvm"),
    Mutant("KvmNotifyAgentBlind", r"unless ignoring .reason, source, vm.", "unless on (job, instance)"),
    Mutant("KvmNotifyAgentBlind", r"and ignoring .reason, source, vm.\s+kvm_vm_source_info"),
    Mutant(
        "KvmNotifyAgentBlind",
        r"kvm_exporter_complete == 0",
        "kvm_exporter_complete == 0 and on (job, instance) kvm_exporter_incomplete_reason_info",
    ),
    Mutant("KvmNotifyVmsLeftOut", ".+", "5m", "for"),
    Mutant("KvmNotifyVmsLeftOut", r"max without .reason."),
    Mutant("KvmNotifyVmsLeftOut", r".owners_pending", ""),
    Mutant("KvmNotifyVmsLeftOut", r"over_budget.", ""),
    Mutant("KvmNotifySnapshotStale", "> 3600", "> 360"),
    Mutant("KvmNotifySnapshotStale", "> 3600", "> 36000"),
    Mutant("KvmNotifySnapshotStale", ".+", "1m", "for"),
    Mutant("instance:kvm_exporter_scraped:bool", REST.format("or on")),
    Mutant("instance:kvm_exporter_scraped:bool", REST.format("or on .job, instance.\\s+0 . .last_over_time")),
    Mutant("instance:kvm_exporter_scraped:bool", "== 0", ">= 0"),
    Mutant("instance:kvm_exporter_scraped:bool", "kvm-notify", "."),
    Mutant("instance:kvm_exporter_scraped:bool", "> 0", ">= 0"),
    Mutant("instance:kvm_exporter_scraped:bool", r"unless on .job, instance. up"),
    Mutant("KvmNotifyExporterDown", "== 0", "== 1"),
    Mutant("KvmNotifyExporterDown", ".+", "1m", "for"),
    Mutant("KvmNotifySourceLost", r"(?s)\n\s+and on.*\[7d\]\)"),
    Mutant("KvmNotifySourceLost", r"\[7d\]", "[1m]"),
    Mutant("KvmNotifySourceLost", REST.format("or on")),
    Mutant("KvmNotifySourceLost", ".+", "5m", "for"),
    Mutant("KvmNotifyVmsUnread", "on .job, instance, vm.", "on (vm)"),
    Mutant("KvmNotifyVmsUnread", "> 0", "> 2"),
    Mutant("KvmNotifyVmsUnread", ".+", "5m", "for"),
    Mutant("KvmNotifyStallsNotDetected", "> 0", ">= 0"),
    Mutant("KvmNotifyStallsNotDetected", "== 1", ">= 0"),
    Mutant("KvmNotifyStallsNotDetected", r"or on .job, instance.\s+count.*== 1."),
    Mutant("KvmNotifyStallsNotDetected", r"and on .job, instance.\s+\w+"),
    Mutant("KvmNotifyStallsNotDetected", ".+", "5m", "for"),
    Mutant("KvmNotifyTraceRecordsLost", "> 10", "> 1"),
    Mutant("KvmNotifyTraceRecordsLost", "> 10", "> 20"),
    Mutant("KvmNotifyTraceRecordsLost", "increase", "delta"),
    Mutant("KvmNotifyTraceRecordsLost", ".+", "5m", "for"),
    Mutant("KvmNotifyTraceBudgetExhausted", "> 100", "> 20"),
    Mutant("KvmNotifyTraceBudgetExhausted", "> 100", "> 200"),
    Mutant("KvmNotifyTraceBudgetExhausted", ".+", "5m", "for"),
    Mutant("KvmNotifyMetricsMissing", 'kind!~"pending.duplicate.unread",'),
    Mutant("KvmNotifyMetricsMissing", ',source!="owners"'),
    Mutant("KvmNotifyMetricsMissing", "success == 0", "success == 2"),
    Mutant("KvmNotifyMetricsMissing", ".+", "5m", "for"),
    Mutant("KvmMicrocodeNotifyExits", "> 1", "> 0.1"),
    Mutant("KvmMicrocodeNotifyExits", "> 1", "> 100"),
    Mutant("KvmMicrocodeNotifyExits", ">= 100", ">= 0"),
    Mutant("KvmMicrocodeNotifyExits", ">= 3", ">= 0"),
    Mutant("KvmMicrocodeNotifyExits", '{microcode!=""}'),
    Mutant("KvmMicrocodeNotifyExits", ".+", "1m", "for"),
    Mutant("KvmMicrocodeUpdateNotifyExits", "> 1", "> 0.1"),
    Mutant("KvmMicrocodeUpdateNotifyExits", "> 1", "> 10"),
    Mutant("KvmMicrocodeUpdateNotifyExits", ">= 4", ">= 0"),
    Mutant("KvmMicrocodeUpdateNotifyExits", ">= 2", ">= 0"),
    Mutant("KvmMicrocodeUpdateNotifyExits", ".+", "1m", "for"),
    Mutant("KvmMicrocodeUpdateNotifyExits", "14d:1h", "1h:1h"),
    Mutant("KvmMicrocodeUpdateNotifyExits", r"and\n\s+instance:kvm_armed_vcpu_days:sum1d >= 4\n"),
    Mutant("KvmMicrocodeUpdateNotifyExits", r"and\n\s+instance:kvm_host_vcpus_armed:sum\n"),
    Mutant("KvmMicrocodeUpdateNotifyExits", r"max by .job, instance.", "max by (job)"),
    Mutant("KvmMicrocodeUpdateNotifyExits", r'(kvm_notify_exits_per_armed_vcpu_day:avg1d){microcode!=""}', r"\1"),
]


def find_sources(rule: Rule) -> set[str]:
    """A rule and the rules that record what it reads."""
    read = {selector.metric for selector in find_selectors(rule.expr)} & RECORDED.keys()
    return {rule.name}.union(*(find_sources(RECORDED[metric]) for metric in read))


def find_concerned(name: str) -> set[str]:
    """The rules that a rule reaches, with what they need besides: the others would only cost time."""
    return set().union(*(find_sources(rule) for rule in RULES if name in find_sources(rule)))


def write_rules(directory: Path, names: set[str], mutant: Mutant) -> None:
    """Write these rules into a directory, one of them broken."""
    for file in RULE_FILES:
        document = copy.deepcopy(DOCUMENTS[file])
        for group in document["groups"]:
            group["rules"] = [body for body in group["rules"] if (body.get("alert") or body["record"]) in names]
            for body in group["rules"]:
                if mutant.rule in (body.get("alert"), body.get("record")):
                    text = re.sub(mutant.old, mutant.new, body[mutant.part])
                    assert text != body[mutant.part]
                    body[mutant.part] = text
        (directory / file.name).write_text(json.dumps(document))


def write_unit_tests(directory: Path, names: set[str], broken: str) -> list[Path]:
    """Write what the unit tests say of these rules into a directory, as far as they load the file that is broken."""

    def is_concerned(case: dict[str, Any]) -> bool:
        if "alertname" in case:
            return case["alertname"] in names
        named = {rule.name for rule in RULES if re.search(rf"{rule.name}\b", case["expr"])}
        return bool(named) and named <= names

    written = []
    for file in TEST_FILES:
        document = copy.deepcopy(DOCUMENTS[file])
        for test in document["tests"]:
            for kind in ("alert_rule_test", "promql_expr_test"):
                test[kind] = [case for case in test.get(kind, ()) if is_concerned(case)]
        document["tests"] = [test for test in document["tests"] if test["alert_rule_test"] or test["promql_expr_test"]]
        document["rule_files"] = [Path(name).name for name in document["rule_files"]]
        if document["tests"] and broken in document["rule_files"]:
            written.append(directory / file.name)
            written[-1].write_text(json.dumps(document))
    return written


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.rule}-{mutant.part}-{mutant.new or 'without'}")
def test_unit_tests_notice_a_broken_rule(mutant: Mutant, tmp_path: Path) -> None:
    concerned = find_concerned(mutant.rule)
    write_rules(tmp_path, concerned, mutant)
    broken = next(rule.file.name for rule in RULES if rule.name == mutant.rule)
    run = run_promtool("test", "rules", *write_unit_tests(tmp_path, concerned, broken))
    assert run.returncode != 0, f"nobody notices: {mutant}"


def test_every_rule_has_been_broken() -> None:
    assert {mutant.rule for mutant in MUTANTS} == {rule.name for rule in RULES}
    timed = {rule.name for rule in ALERTS if "for" in rule.body}
    assert {mutant.rule for mutant in MUTANTS if mutant.part == "for"} >= timed


def find_series_row(mode: str) -> list[str]:
    """The cells of the table of docs/fleet.md for this ``--vcpu-series``."""
    header = ("`--vcpu-series`", "series of one agent", "50 VMs of 8 vCPUs", "20,000 such hosts")
    rows = find_table(DOCS / "fleet.md", *header)
    (cells,) = (cells for first, *cells in rows if first.startswith(f"`{mode}`"))
    return cells


def test_the_documents_say_how_urgent_an_alert_is() -> None:
    assert sorted(find_listed_alerts()) == sorted((rule.name, rule.body["labels"]["severity"]) for rule in ALERTS)


KEPT_CENTRALLY: Final = {"kvm_host_info", "kvm_host_vcpus", "kvm_exporter_build_info", "kvm_exporter_source_up"} | {
    "kvm_vcpu_no_forward_progress",
    "kvm_vcpu_drill",
    "kvm_vcpu_stall_start_timestamp_seconds",
    "vm:kvm_vm_notify_window_exits:rate5m",
    "vm:kvm_vm_info:notified",
    "ALERTS",
    "ALERTS_FOR_STATE",
}
KEPT_BESIDE_AGENTS: Final = {"kvm_vm_info", "kvm_vcpu_exits_total", "kvm_vm_notify_window_exits_total"} | {
    "vm:kvm_vm_info:unique",
    "vm:kvm_stalled_vm_info:unique",
    "vm:kvm_vm_notify_lost_seconds:rate5m",
    "node_load1",
}


def find_central_expressions() -> list[tuple[str, re.Pattern[str]]]:
    """What docs/fleet.md sends to a central Prometheus, each way: where a ``job`` is asked for, it follows a ";"."""
    documents = [yaml.safe_load(block) for block in find_blocks(DOCS / "fleet.md", "yaml")]
    (keep,) = (
        relabeling
        for document in documents
        for remote in document.get("remote_write", ())
        for relabeling in remote["write_relabel_configs"]
    )
    assert (keep["action"], keep["source_labels"]) == ("keep", ["__name__", "job"])
    (matches,) = (
        scrape["params"]["match[]"]
        for document in documents
        for scrape in document.get("scrape_configs", ())
        if "params" in scrape
    )
    selectors = [re.fullmatch(r'(\w*)\{(__name__|job)=~"(.*)"\}', match) for match in matches]
    assert all(selectors)
    parts = [f"(?:{one[3]});.*" if one[2] == "__name__" else f"{one[1]};{one[3]}" for one in selectors if one]
    return [("remote_write", re.compile(keep["regex"])), ("federate", re.compile("|".join(parts)))]


def test_a_central_prometheus_gets_what_it_needs_and_no_vm() -> None:
    fleet = {
        selector.metric
        for rule in RULES
        if rule.file.name == "kvm-notify-fleet.rules.yml"
        for selector in find_selectors(rule.expr)
        if not selector.metric.startswith("microcode:")
    }
    for way, regex in find_central_expressions():
        for metric in fleet | KEPT_CENTRALLY:
            assert regex.fullmatch(f"{metric};kvm-notify-exporter"), f"{way} leaves {metric} out"
        for metric in KEPT_BESIDE_AGENTS:
            assert not regex.fullmatch(f"{metric};kvm-notify-exporter"), f"{way} sends {metric}"
        assert regex.fullmatch("up;kvm-notify-exporter")
        assert not regex.fullmatch("up;node")
        assert not regex.fullmatch("ALERTS;node")


def test_files_that_the_documents_name_are_there() -> None:
    paths = [path for text in ALL_DOCUMENTS for path in re.findall(r"(?<![\w/])grafana/[\w./*-]+", text.read_text())]
    assert {"grafana/alerts/", "grafana/dashboards/*.json", "grafana/provisioning/dashboards/*.yml"} <= set(paths)
    for path in paths:
        assert list(ROOT.glob(path.rstrip("/."))), path
    provider = yaml.safe_load(next((ROOT / "grafana/provisioning/dashboards").glob("*.yml")).read_text())
    for one in provider["providers"]:
        assert f"cp grafana/dashboards/*.json {one['options']['path']}/" in (DOCS / "dashboards.md").read_text()


class HostOfArmedVms:
    """A made-up host that has the three sources of a real one; each VM of it has its protection armed."""

    def __init__(self, vm_count: int, vcpus_per_vm: int, clock: Iterator[float]) -> None:
        # Of six made-up VMs, three are armed: the first three.
        self._host = SimulatedHost(
            lambda: next(clock), lambda: 1_800_000_000.0, vm_count=2 * vm_count, vcpus_per_vm=vcpus_per_vm
        )

    def read(self) -> Snapshot:
        snapshot = self._host.read()
        armed = tuple(reading for reading in snapshot.readings if reading.protection is Protection.ARMED)
        sources = tuple(SourceReport(name, up=True) for name in ("bpf", "stats_fd", "debugfs"))
        return replace(snapshot, readings=armed, sources=sources)

    def close(self) -> None:
        self._host.close()


def find_notified(snapshot: Snapshot) -> list[VcpuReport]:
    """A report on each vCPU that has taken notify exits."""
    return [
        replace(make_report(vm=reading.vm), vcpu=vcpu)
        for reading in snapshot.readings
        for vcpu, count in zip(reading.vcpus, reading.counters.per_vcpu[NOTIFY_WINDOW_EXITS], strict=True)
        if count
    ]


@pytest.mark.parametrize(("mode", "of_vcpu", "of_notified"), [("all", 2, 5), ("active", 0, 7), ("none", 0, 2)])
def test_series_of_one_agent(mode: str, of_vcpu: int, of_notified: int, tell: Callable[[str], None]) -> None:
    """What the arithmetic of docs/fleet.md says: 14 of the host, 36 of the agent, 10 a VM, and those of vCPUs."""
    row = find_series_row(mode)
    assert row[0] == " + ".join(["66", "10 V", *([f"{of_vcpu} C"] if of_vcpu else []), f"{of_notified} N"])
    healthy = 66 + 10 * 50 + of_vcpu * 50 * 8
    assert row[1:] == [f"{healthy:,}", f"{round(20_000 * healthy / 1e6)} million"]
    vms, vcpus = 48, 8
    reports: list[VcpuReport] = []

    def read_report() -> MonitorReport:
        report = MonitorReport(
            vcpus=tuple(reports), interval_min_seconds={0: 0.001}, context_invalid={}, agent_usage=USAGE
        )
        return with_figures(report)

    host = HostOfArmedVms(vms, vcpus, iter([0.0, 1.0, 100.0, 101.0]))
    settings = CollectorSettings(vcpu_series=VcpuSeries(mode))
    collector = HostCollector(host, settings, BuildInfo("1", "2", "3"), time.perf_counter, read_report)
    collector.collect()
    reports += find_notified(host.read())
    text = render_text(collector.collect())
    series = [line for line in text.splitlines() if not line.startswith("#")]
    notified = len(reports)
    assert notified == 32
    stalled = sum(report.verdict.state is State.STALLED for report in reports)
    assert stalled == notified
    claims = sum(line.startswith("kvm_vm_claimed_info{") for line in series)  # of VMs for which nobody vouches
    assert claims == vms // 3
    assert len(series) == claims + 14 + 36 + 10 * vms + of_vcpu * vms * vcpus + of_notified * notified + stalled
    tell(f"--vcpu-series={mode}: {len(series)} series of {vms} VMs, {vms * vcpus} vCPUs, {notified} with notify exits")


def test_tell_how_many(tell: Callable[[str], None]) -> None:
    run_promtool("--version")  # without it, nothing below has been tried
    cases = [
        case for test in UNIT_TESTS for kind in ("alert_rule_test", "promql_expr_test") for case in test.get(kind, [])
    ]
    tell(
        f"rules for Prometheus: {len(RECORDED)} recording rules and {len(ALERTS)} alerts; promtool: {len(UNIT_TESTS)} "
        f"unit tests with {len(cases)} checks; {len(MUTANTS)} rules broken on purpose, each noticed"
    )
