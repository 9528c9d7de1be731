"""Runs the agent inside the lab and finds what it says about one VM."""

from __future__ import annotations

import re
import subprocess


def run_once(*flags: str) -> str:
    """Returns what ``kvm-notify-exporter once`` prints; AssertionError with its stderr when it fails."""
    done = subprocess.run(["kvm-notify-exporter", "once", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def find_labels(text: str, metric: str, vm: str) -> list[tuple[dict[str, str], float]]:
    """Returns labels and value of each sample of a metric that is about one VM."""
    found = []
    for labels_text, value in re.findall(rf"^{metric}{{(.*?)}} (\S+)$", text, re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', labels_text))
        if labels.get("vm") == vm:
            found.append((labels, float(value)))
    return found


def find_per_vcpu(text: str, metric: str, vm: str) -> dict[str, float]:
    """Returns the values of a metric of one VM by its vcpu label."""
    return {labels["vcpu"]: value for labels, value in find_labels(text, metric, vm)}
