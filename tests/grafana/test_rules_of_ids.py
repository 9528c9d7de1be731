"""The rules over what an agent with ``--web.labels=ids`` exports: they page, by id, and no join loses a VM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from exporter.build_info import BuildInfo
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.selection import CollectorSettings
from exporter.prometheus.vm_series import VmLabels
from exporter.stalls.verdicts import MonitorReport, VcpuReport
from kvm.model import Snapshot
from kvm.simulated.host import SimulatedHost
from tests.grafana.test_rules import DIRECTORY, run_promtool
from tests.reports import USAGE, make_report, with_figures

SAMPLE = re.compile(r"^(kvm_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
STALLED = 2
NAMES = ("name", "display_name", "project", "vm_namespace")


def export(vm_labels: VmLabels) -> tuple[str, Snapshot]:
    """What an agent exports of a host where the first vCPUs of the first VMs are stalled, and all VMs are."""
    host = SimulatedHost(lambda: 1000.0, lambda: 1_800_000_000.0)
    snapshot = host.read()
    stalled: tuple[VcpuReport, ...] = tuple(make_report(vm=reading.vm) for reading in snapshot.readings[:STALLED])
    report = with_figures(MonitorReport(vcpus=stalled, interval_min_seconds={}, context_invalid={}, agent_usage=USAGE))
    settings = CollectorSettings(vm_labels=vm_labels)
    collector = HostCollector(host, settings, BuildInfo("1", "2", "3"), lambda: 0.0, lambda: report)
    return render_text(collector.collect()), snapshot


def build_series(exposition: str) -> list[dict[str, str]]:
    """The series of an exposition as of a host that has been scraped for ten minutes; counters grow."""
    series = []
    for name, labels, value in SAMPLE.findall(exposition):
        target = ['job="kvm"', 'instance="host1"', *([labels] if labels else [])]
        grows = "+6" if name.endswith("_exits_total") else "+0"
        series.append({"series": f"{name}{{{', '.join(target)}}}", "values": f"{value}{grows}x40"})
    return series


@pytest.mark.parametrize("vm_labels", VmLabels)
def test_alerts_page_by_what_is_left_and_no_vm_is_lost(vm_labels: VmLabels, tmp_path: Path) -> None:
    text, snapshot = export(vm_labels)

    def describe(labels: dict[str, str]) -> str:
        return "{" + ", ".join(f"{name}={json.dumps(value)}" for name, value in labels.items() if value) + "}"

    def expect(number: int) -> list[dict[str, Any]]:
        expected = []
        for reading in snapshot.readings[:number]:
            owner = reading.vm.owner
            labels = {"vm": reading.vm.id, "uuid": owner.uuid, "vmm": owner.vmm}
            if vm_labels is VmLabels.FULL:
                labels["name"] = owner.name
                if owner.identity.is_vouched:
                    labels |= {"project": owner.project, "vm_namespace": owner.namespace}
                    labels["display_name"] = owner.display_name
            expected.append({"labels": describe(labels), "value": 1})
        return expected

    by = ", ".join(("vm", "uuid", "vmm", *NAMES))
    firing = 'ALERTS{alertname="KvmVcpuNoForwardProgress", alertstate="firing"}'
    expressions = {
        f"count by ({by}) ({firing})": expect(STALLED),
        f"count by ({by}) (vm:kvm_vm_info:unique)": expect(len(snapshot.readings)),
        # The join of docs/metrics.md keeps every VM whose counter is known.
        "count(rate(kvm_vm_notify_window_exits_total[5m]) * on (job, instance, vm) group_left (name, project, "
        "vm_namespace) kvm_vm_info)": [
            {"labels": "{}", "value": sum(reading.notify_exits is not None for reading in snapshot.readings)}
        ],
    }
    tests = [{"expr": expr, "eval_time": "9m", "exp_samples": samples} for expr, samples in expressions.items()]
    document = {
        "rule_files": [str(path) for path in sorted(DIRECTORY.glob("kvm-notify-[ar]*.rules.yml"))],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": build_series(text), "promql_expr_test": tests}],
    }
    (tmp_path / "ids.test.yml").write_text(json.dumps(document))
    run = run_promtool("test", "rules", tmp_path / "ids.test.yml")
    assert run.returncode == 0, run.stdout + run.stderr
