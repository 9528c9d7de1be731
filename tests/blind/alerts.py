"""Asks promtool which of the project's alerts fire on what was scraped of an agent."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.blind.claims import Truth, find_listed, find_served
from tests.blind.surfaces import Answers

ALERTS: Final = Path(__file__).parents[2] / "grafana/alerts"
# An agent has to be blind for 15 minutes before somebody is told.
ALERT_AFTER: Final = "20m"
# Why VMs are left out that the agent sees: that has an alert of its own, which hides nothing else.
LEFT_OUT: Final = {"over_budget", "owners_pending"}
UP: Final = 'up{job="kvm-notify-exporter", instance="host1"}'


class Scraped(NamedTuple):
    """What Prometheus has scraped, and what it does not say: VMs that are missing there, and VMs that are not read."""

    text: str
    are_missing: bool
    are_unread: bool

    @staticmethod
    def take(truth: Truth, answers: Answers) -> Scraped:
        """Keep of the answers what alerts look at."""
        lines = [line for line in answers.scraped.splitlines() if line.startswith(("kvm_exporter_", "kvm_vm_"))]
        text = "\n".join(line for line in lines if "_bucket" not in line)
        listed = find_listed(truth, answers)
        return Scraped(text, set(truth.after) != listed, listed != find_served(truth, answers))


def claim_by_alerts(scraped: Scraped, directory: Path) -> Iterator[str]:
    """What Prometheus claims by no alert, after 20 minutes of what was scraped: asked of promtool."""
    series = [split_sample(line) for line in scraped.text.splitlines()]
    firing = find_firing([(UP, "1x30"), *((name, f"{value}x30") for name, value in series)], directory)
    reasons = set(re.findall(r'^kvm_exporter_incomplete_reason_info\{reason="(\w+)"\} 1', scraped.text, re.MULTILINE))
    wanted = "KvmNotifyVmsLeftOut" if reasons and reasons <= LEFT_OUT else "KvmNotifyAgentBlind"
    if scraped.are_missing and wanted not in firing:
        yield f"{wanted} does not fire"
    if scraped.are_unread and not firing & {"KvmNotifyAgentBlind", "KvmNotifyVmsLeftOut", "KvmNotifyVmsUnread"}:
        yield "no alert says that VMs are not read"


def find_firing(series: list[tuple[str, str]], directory: Path) -> set[str]:
    """Ask promtool which alerts of ours fire, after a while, on series and their values of each minute."""
    expr = 'count by (alertname) (ALERTS{alertstate="firing"})'
    document = {
        "rule_files": [str(path) for path in sorted(ALERTS.glob("*.rules.yml"))],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series],
                "promql_expr_test": [{"expr": expr, "eval_time": ALERT_AFTER, "exp_samples": []}],
            }
        ],
    }
    file = directory / "scraped.test.yml"
    # YAML knows no escaped surrogates; and promtool, unlike a scrape, takes no U+FFFD. Strangers' names may have both.
    file.write_text(json.dumps(document, ensure_ascii=False).replace("\ufffd", "?"))
    run = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    got = run.stdout + run.stderr
    assert "got:" in got or "SUCCESS" in got, got
    return set(re.findall(r'alertname="(\w+)"', got.partition("got:")[2]))


def split_sample(line: str) -> tuple[str, str]:
    """Split a line of the exposition into a series of host1 and its value, as promtool writes it."""
    name, value = line.rsplit(" ", 1)
    metric, brace, labels = name.partition("{")
    target = 'job="kvm-notify-exporter", instance="host1"'
    joined = f"{target}, {labels}" if brace else f"{target}}}"
    return f"{metric}{{{joined}", f"{float(value):.0f}"
