"""The table of metrics keeps to the conventions of Prometheus, and is what the collector produces."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from exporter.build_info import BuildInfo
from exporter.prometheus import metrics
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.metrics import METRICS, Metric, MetricType, order_labels
from exporter.prometheus.selection import COLLECTORS, CollectorSettings
from exporter.stalls.verdicts import MonitorReport
from kvm.model import BlindSpot, Snapshot
from kvm.simulated.host import SimulatedHost
from kvm.statistics import LeftOut, StatScope, StatTable, VmStatistics
from tests.reports import USAGE, make_report, with_figures

# promtool's own lists (client_golang, prometheus/testutil/promlint).
NOT_BASE_UNITS = {"milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks", "kelvin", "bits"}
UNIT_ABBREVIATIONS = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "m", "h", "d"}
TYPES_IN_NAMES = {"counter", "gauge", "histogram", "summary", "untyped"}


@pytest.fixture(params=METRICS, ids=lambda metric: metric.name)
def metric(request: pytest.FixtureRequest) -> Metric:
    assert isinstance(request.param, Metric)
    return request.param


def test_name_is_a_prometheus_name(metric: Metric) -> None:
    assert re.fullmatch(r"kvm_(vcpu|vm|host|exporter)(_[a-z]+)+", metric.name)
    words = set(metric.name.split("_"))
    assert not words & (NOT_BASE_UNITS | UNIT_ABBREVIATIONS | TYPES_IN_NAMES)
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created"))


def test_total_is_for_counters_only(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.type is MetricType.COUNTER)
    assert not metric.family.endswith("_total")


def test_unit_is_the_last_word_of_the_name(metric: Metric) -> None:
    last_word = metric.family.rpartition("_")[2]
    assert metric.unit == (last_word if last_word in {"seconds", "cycles"} else "")


def test_labels_are_legal_and_in_order(metric: Metric) -> None:
    assert list(metric.labels) == sorted(set(metric.labels))
    for label in metric.labels:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label)
    assert not set(metric.labels) & {"le", "quantile", "type", "job", "instance", "host"}


def test_vcpu_series_have_two_labels(metric: Metric) -> None:
    if metric.name.startswith("kvm_vcpu_"):
        assert metric.labels == ("vcpu", "vm")


def test_help_says_what_it_is(metric: Metric) -> None:
    assert len(metric.help) > 20
    assert metric.help.endswith(".")
    assert metric.help == metric.help.strip()
    if "notify_window_exits" in metric.name:
        assert "KVM stat notify_window_exits" in metric.help


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.family for metric in METRICS}) == len(METRICS)


def test_table_holds_every_declared_metric() -> None:
    declared = {value for value in vars(metrics).values() if isinstance(value, Metric)}
    assert declared == set(METRICS)


def test_order_labels_refuses_other_names() -> None:
    assert order_labels(metrics.VM_SOURCE_INFO, vm="a", source="bpf") == ("bpf", "a")
    with pytest.raises(ValueError, match="kvm_vm_source_info"):
        order_labels(metrics.VM_SOURCE_INFO, vm="a")
    with pytest.raises(ValueError, match="kvm_vm_source_info"):
        order_labels(metrics.VM_SOURCE_INFO, vm="a", source="bpf", rip="0")


class ErringHost:
    """A simulated host on which something could not be read."""

    def __init__(self, clock: Iterator[float], *blind_spots: BlindSpot) -> None:
        self._blind_spots = blind_spots
        self._host = SimulatedHost(lambda: next(clock), lambda: 1_800_000_000.0)

    def read(self) -> Snapshot:
        snapshot = self._host.read()
        left_out = StatTable(StatScope.VM, left_out=(LeftOut("vcpu/odd", "unit", "unit 7 is not known"),))
        counters = snapshot.readings[0].counters._replace(statistics=VmStatistics(left_out))
        readings = (replace(snapshot.readings[0], counters=counters), *snapshot.readings[1:])
        errors = {("stats_fd", "malformed"): 2}
        return replace(snapshot, readings=readings, errors=errors, blind_spots=self._blind_spots)

    def close(self) -> None:
        self._host.close()


def make_watch_report() -> MonitorReport:
    """What the stall monitor might say of the simulated host, with something of everything."""
    reading = next(r for r in SimulatedHost().read().readings if r.vm.owner.name == "batch-1")
    report = replace(make_report(vm=reading.vm), vcpu=reading.vcpus[0])
    drill = replace(report, drill=True)
    return with_figures(
        MonitorReport(
            vcpus=(report, drill), interval_min_seconds={128_000: 0.025}, context_invalid={}, agent_usage=USAGE
        )
    )


def collect_families(*blind_spots: BlindSpot) -> dict[str, prometheus_client.Metric]:
    reader = ErringHost(iter([0.0, 1.0, 100.0]), *blind_spots)
    build = BuildInfo("1", "2", "3")
    collector = HostCollector(
        reader,
        CollectorSettings(enabled=frozenset(COLLECTORS)),
        build,
        time.perf_counter,
        make_watch_report,
        file_states={metrics.WEB_CONFIG_RELOAD_SUCCESS: lambda: True, metrics.STATE_FILE_SUCCESS: lambda: True},
    )
    collector.collect()
    return {family.name: family for family in text_string_to_metric_families(render_text(collector.collect()))}


def test_produced_is_declared() -> None:
    seeing, blind = collect_families(), collect_families(BlindSpot("hidden_processes", "/proc hides process 1"))
    # Counts of VMs are absent where VMs may be missing, and why they may be where none can be.
    assert seeing.keys() - blind.keys() == {"kvm_host_vms", "kvm_host_vcpus"}
    assert blind.keys() - seeing.keys() == {"kvm_exporter_incomplete_reason_info"}
    declared = [metric.family for metric in METRICS]
    assert seeing.keys() | blind.keys() == set(declared)
    for families in (seeing, blind):
        assert [*families] == [name for name in declared if name in families]
    for metric in METRICS:
        family = (seeing | blind)[metric.family]
        assert family.type == metric.type
        assert family.documentation == metric.help
        for sample in family.samples:
            assert sample.name == metric.name
            assert set(sample.labels) == set(metric.labels)
