"""The statistics of a kernel, one captured and the one that runs, and the metrics that they are.

Kernels differ in what they count, and builds of one release do: what a real agent shows here is held to what runs here,
what documents and dashboards name to the captured one.
"""

from __future__ import annotations

from pathlib import Path

from exporter.prometheus.metrics import Metric, MetricType
from exporter.prometheus.stat_metrics import name_statistics
from kvm.binary_stats import Statistic, decode_descriptors, decode_header
from kvm.host.throwaway_vm import ThrowawayVm
from kvm.statistic_plan import plan_statistics
from kvm.statistics import StatScope, StatSelection, StatTable

FIXTURES = Path(__file__).parent / "fixtures"
CAPTURES = {
    StatScope.VM: FIXTURES / "vm_stats" / "linux-6.18.bin",
    StatScope.VCPU: FIXTURES / "stats" / "linux-6.18.bin",
}


def read_captured(scope: StatScope) -> dict[str, Statistic]:
    """Return the descriptors of a captured statistics file, by name."""
    block = CAPTURES[scope].read_bytes()
    header = decode_header(block, "capture")
    return decode_descriptors(header, block[header.desc_offset :], "capture")


def plan_captured(level: StatScope) -> StatTable:
    """Return the table of all statistics of that kernel."""
    selection = StatSelection(level, lambda _key: True)
    return plan_statistics(selection, read_captured(StatScope.VM), read_captured(StatScope.VCPU), 4096).table


def plan_running(level: StatScope) -> StatTable:
    """Return the table of all statistics of the kernel that runs here."""
    with ThrowawayVm() as vm:
        return plan_statistics(StatSelection(level, lambda _key: True), vm.vm_statistics, vm.statistics, 4096).table


def name_samples(metric: Metric) -> str:
    """Return what a metric's samples are called."""
    return f"{metric.name}_bucket" if metric.type is MetricType.HISTOGRAM else metric.name


def name_metrics(table: StatTable) -> dict[str, Metric]:
    """Return the metrics of all statistics of a table, by what their samples are called."""
    named = name_statistics(table)
    return {name_samples(metric): metric for metric in (*named.vm, *named.vcpu) if metric is not None}


STATISTIC_METRICS: dict[str, Metric] = {
    name: metric for level in StatScope for name, metric in name_metrics(plan_captured(level)).items()
}
