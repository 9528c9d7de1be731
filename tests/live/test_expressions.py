"""Every expression of rules and dashboards, asked of a real Prometheus: each finds something, and none of them errs.

What real agents give (`monitored_hosts`) is enough, unless a table here says why it cannot be: then it must be in the
simulated history (`simulated_history`). A new expression is in no table, so it must find something of the agents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from exporter.prometheus.metrics import METRICS, STATISTICS_LEFT_OUT, VCPU_CONTEXT_INVALID
from kvm.statistics import StatScope
from tests.grafana.dashboard_queries import find_panels, read_dashboards
from tests.grafana.promql import find_selectors
from tests.known_statistics import STATISTIC_METRICS, name_metrics, plan_running
from tests.live.expressions import (
    find_dashboard_questions,
    find_document_questions,
    find_questions,
    find_rule_questions,
)
from tests.live.history_writer import parse_seconds, read_groups
from tests.live.monitored_hosts import Answer, Episode, Question, find_rule_files

pytestmark = pytest.mark.live

# Where each alert is found: instances of `monitored_hosts` or of `simulated_history`; "" if it is about no single one.
SCENARIOS: Mapping[str, str] = {
    "KvmVcpuNoForwardProgress": "demo",
    "KvmVmUnprotected": "demo",
    "KvmNotifyExporterDown": "gone lost",
    "KvmNotifyAgentBlind": "blind hidden",
    "KvmNotifyVmsLeftOut": "crowded",
    "KvmNotifySnapshotStale": "faulty",
    "KvmNotifySourceLost": "blind faulty",
    "KvmNotifyVmsUnread": "blind",
    "KvmVcpuContextInvalid": "faulty",
    "KvmVmNotifyExitsRising": "fleet-1",
    "KvmNotifyStallsNotDetected": "untraced",
    "KvmNotifyTraceRecordsLost": "faulty",
    "KvmNotifyTraceBudgetExhausted": "faulty",
    "KvmNotifyMetricsMissing": "faulty",
    "KvmMicrocodeNotifyExits": "",
    "KvmMicrocodeUpdateNotifyExits": "fleet-1 fleet-2 fleet-3",
}

_NO_INTEL = "takes an Intel CPU that loses the state of a guest"
_NOTHING_LOST = "the simulated host loses no records, and no guest here takes notify exits"
_NO_CLAIM = "the VM that the boards are asked about has its owner from libvirt, so its user claims nothing"
_FRESH = "an agent that is scraped has read its host just now"
_NO_FAULT = "a collector fails if it has a bug, or the kernel one"
_TRACED = "no agent here has vCPUs that are armed and cannot be traced: that takes an Intel host under confidentiality"
_NO_STATISTICS = "this kernel describes no statistic that is not understood"
_NO_REBOOT = "no host is rebooted here"
_FLEET_WIDE = "no alert about a whole fleet fires within minutes"
_NONE_LOST = "no agent that does not see every VM is lost here"
_NOT_CROWDED = "no user here has more VMs than are shown of one"
_TOO_SHORT = "two stalls in a minute and a half are too few"
# What the simulated history has to answer: (place, metric) and why. "" stands for any.
MADE_UP: Mapping[tuple[str, str], str] = {
    ("", "kvm_vcpu_notify_context_invalid_exits_total"): _NO_INTEL,
    ("kvm-notify-vm: What its identity rests on", "kvm_vm_claimed_info"): _NO_CLAIM,
    ("alert KvmNotifyTraceRecordsLost", ""): _NOTHING_LOST,
    ("kvm-notify-fleet: Agents with problems", "kvm_exporter_trace_lost_records_total"): _NOTHING_LOST,
    ("alert KvmNotifyTraceBudgetExhausted", ""): _TOO_SHORT,
    ("alert KvmNotifyMetricsMissing", ""): _NO_FAULT,
    ("alert KvmNotifySnapshotStale", ""): _FRESH,
    ("documents", "kvm_exporter_snapshot_timestamp_seconds"): _FRESH,
    ("kvm-notify-fleet: Agents with problems", "kvm_exporter_scrape_collector_success"): _NO_FAULT,
    ("documents", "kvm_exporter_scrape_collector_success"): _NO_FAULT,
    ("alert KvmNotifyStallsNotDetected", ""): _TRACED,
    ("kvm-notify-fleet: Blind to stalls", "kvm_host_vcpus_no_forward_progress"): _TRACED,
    ("kvm-notify-fleet: Agents down or blind", "kvm_host_vcpus_no_forward_progress"): _TRACED,
    ("kvm-notify-fleet: Agents down or blind", "kvm_exporter_incomplete_reason_info"): _NOT_CROWDED,
    ("alert KvmNotifyVmsLeftOut", ""): _NOT_CROWDED,
    ("record instance:kvm_exporter_scraped:bool", "kvm_exporter_complete"): _NONE_LOST,
    ("documents", "kvm_exporter_incomplete_reason_info"): _NOT_CROWDED,
    ("kvm-notify-fleet: Firing alerts", ""): _FLEET_WIDE,
    ("kvm-notify-host: Statistics left out", ""): _NO_STATISTICS,
    ("kvm-notify-host: annotation Microcode or kernel changed", ""): _NO_REBOOT,
}
# These are recorded each 15 s or minute, before anything else happens; the others when it is too late for the episode.
RECORDED_AT_ONCE = {"vm:kvm_vm_info:unique", "vm:kvm_stalled_vm_info:unique", "instance:kvm_host_info:unique"}
RECORDED_RARELY = "what rules record each minute or more rarely, a minute and a half sees once or never"


def find_excuse(question: Question) -> str:
    """Why the agents need not answer a question; "" if they have to."""
    asked = {selector.metric for selector in find_selectors(question.expr)}
    if any(":" in metric for metric in asked - RECORDED_AT_ONCE):
        return RECORDED_RARELY
    for (place, metric), why in MADE_UP.items():
        if place in ("", question.place) and (metric in asked or not metric):
            return why
    return ""


def find_wanted(questions: list[Question], episode: Episode) -> dict[Question, Answer]:
    """The answers that count: the history's where there is an excuse."""
    return {
        question: (episode.history if find_excuse(question) else episode.agents)[question] for question in questions
    }


def test_every_expression_finds_something(episode: Episode, tell: Callable[[str], None]) -> None:
    answers = find_wanted(find_questions(), episode)
    assert [str(question) for question, answer in answers.items() if not answer.found] == []
    of_agents = sum(1 for question in answers if not find_excuse(question))
    rules, panels = find_rule_questions(), [panel for one in read_dashboards() for panel in find_panels(one)]
    whole = {*rules, *find_dashboard_questions(), *find_document_questions()}
    tell(
        f"{len(whole)} expressions of {len(rules)} rules, {len(panels)} panels and the documents, {len(answers)} with "
        f"the branches of 'or': non-empty on a real Prometheus, {of_agents} by what agents gave, "
        f"{len(answers) - of_agents} by two days of simulated history"
    )


def test_no_question_errs(episode: Episode, tell: Callable[[str], None]) -> None:
    """The VMs of the demo are on several instances, as if they migrated: no join may trip over that."""
    answers = [*episode.agents.items(), *episode.history.items()]
    assert [f"{question}: {answer.error}" for question, answer in answers if answer.error] == []
    assert episode.choices == {}
    tell(f"{len(answers)} questions to a real Prometheus, no error and no warning")


def test_prometheus_finds_no_error_in_a_rule(episode: Episode) -> None:
    """Groups that are evaluated more rarely than each minute are only replayed (`history_writer`)."""
    assert [rule for rule in episode.rules if rule["health"] == "err" or rule.get("lastError")] == []
    groups = [group for group in read_groups(find_rule_files()) if parse_seconds(group["interval"]) <= 60]
    names = {rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]}
    assert names - {rule["name"] for rule in episode.rules if rule["health"] == "ok"} == set()


@pytest.mark.parametrize("alert", SCENARIOS)
def test_an_alert_finds_those_that_it_is_for(episode: Episode, alert: str) -> None:
    (question,) = (question for question in find_rule_questions() if question.place == f"alert {alert}")
    answers = [episode.agents[question], episode.history[question]]
    found = [labels for answer in answers for labels in answer.found]
    assert found
    assert set(SCENARIOS[alert].split()) <= {instance for answer in answers for instance in answer.instances}


def test_every_alert_has_a_scenario() -> None:
    alerts = {question.place for question in find_rule_questions() if question.place.startswith("alert ")}
    assert alerts == {f"alert {alert}" for alert in SCENARIOS}


def test_no_alert_is_about_a_healthy_host(episode: Episode) -> None:
    """The agent on this machine: two guests, nothing wrong."""
    found = {
        question.place.removeprefix("alert ")
        for question in find_rule_questions()
        if question.place.startswith("alert ") and "real" in episode.agents[question].instances
    }
    # Our guests do not ask for notify exits, which matters on a host that has them; a scrape may be late here.
    assert found <= {"KvmVmUnprotected", "KvmNotifyExporterDown"}
    assert not any(
        alert["labels"].get("instance") == "real:9750" and alert["state"] == "firing" for alert in episode.alerts
    )


def test_every_excuse_is_needed_by_some_expression() -> None:
    questions = find_questions()
    unused = [
        key
        for key, why in MADE_UP.items()
        if not any(find_excuse(question) == why and key[0] in ("", question.place) for question in questions)
    ]
    assert unused == []


def test_what_alerts_say_is_complete(episode: Episode) -> None:
    texts = [text for alert in episode.alerts for text in alert["annotations"].values()]
    assert texts
    (unread,) = (alert for alert in episode.alerts if alert["labels"]["alertname"] == "KvmNotifyVmsUnread")
    assert re.search(r"among them \w", unread["annotations"]["description"])
    assert [text for text in texts if "<error" in text or "<no value>" in text or "{{" in text or "%!" in text] == []


def test_prometheus_has_every_declared_metric_and_no_other(episode: Episode) -> None:
    declared = {metric.name for metric in METRICS}
    of_kvm = {name for name in episode.metric_names if re.match("kvm_(vm|vcpu)_stat_", name)}
    # Real agents sum over VMs what can be summed; the demo's, of another kernel, have some of each vCPU.
    running = name_metrics(plan_running(StatScope.VM)).keys()
    assert running <= of_kvm <= running | STATISTIC_METRICS.keys()
    assert declared - episode.metric_names == {VCPU_CONTEXT_INVALID.name, STATISTICS_LEFT_OUT.name}
    assert {name for name in episode.metric_names if name.startswith("kvm_")} <= declared | of_kvm
