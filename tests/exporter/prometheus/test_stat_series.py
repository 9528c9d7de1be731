"""The lines of KVM's statistics: what parsers make of them, and what is kept while nothing moves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter.build_info import BuildInfo
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import Family, render_text
from exporter.prometheus.selection import COLLECTORS, CollectorSettings
from exporter.prometheus.stat_series import StatSeries
from kvm.model import Snapshot, Vcpu, VmReading
from kvm.statistics import LeftOut, StatDescriptor, StatKind, StatScope, StatTable, StatUnit, VmStatistics
from tests.snapshots import make_reading, make_snapshot

VM, VCPU = StatScope.VM, StatScope.VCPU
EXITS = StatDescriptor(VCPU, "exits", StatKind.CUMULATIVE)
WAIT = StatDescriptor(VCPU, "halt_wait_ns", StatKind.CUMULATIVE, StatUnit.SECONDS, 10, -9)
HIST = StatDescriptor(VCPU, "halt_wait_hist", StatKind.LOG_HISTOGRAM, StatUnit.SECONDS, 10, -9, size=4)
LINEAR = StatDescriptor(VM, "sizes", StatKind.LINEAR_HISTOGRAM, StatUnit.BYTES, 2, 10, size=3, bucket_size=5)
PAGES = StatDescriptor(VM, "pages", StatKind.INSTANT, StatUnit.BYTES, 2, 12)
MODE = StatDescriptor(VCPU, "guest_mode", StatKind.INSTANT, StatUnit.BOOLEAN)
OF_VMS = StatTable(VM, (PAGES, LINEAR), (EXITS, WAIT, HIST))
OF_VCPUS = StatTable(VCPU, (PAGES,), (EXITS, MODE, HIST))
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def add_statistics(reading: VmReading, statistics: VmStatistics) -> VmReading:
    return replace(reading, counters=reading.counters._replace(statistics=statistics))


def make_summed(name: str = "web", pid: int = 4242, exits: int = 7) -> VmReading:
    return add_statistics(make_reading(name, pid=pid), VmStatistics(OF_VMS, (3, 1, 0, 2), (exits, 1_500, 5, 0, 2, 1)))


def make_split() -> VmReading:
    columns = ((7, 8), (0, 1), (5, 1), (0, 1), (2, 1), (1, 1))
    return add_statistics(make_reading(), VmStatistics(OF_VCPUS, (3,), None, columns))


def collect(series: StatSeries, *readings: VmReading) -> list[Family]:
    return series.collect((reading.vm.id, reading) for reading in readings)


def parse_both(families: Sequence[Family]) -> Series:
    """What prometheus_client's two parsers make of it, which must be the same."""
    text = [*parse_text(render_text(families))]
    text_of_openmetrics = render_text(families, openmetrics=True) + "# EOF\n"
    open_metrics = [*parse_openmetrics(text_of_openmetrics)]  # type: ignore[no-untyped-call]
    found, other = (
        {(sample.name, frozenset(sample.labels.items())): sample.value for family in made for sample in family.samples}
        for made in (text, open_metrics)
    )
    assert found == other
    assert [family.type for family in text] == [family.type for family in open_metrics]
    return found


def find(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def test_sums_over_a_vm() -> None:
    series = parse_both(collect(StatSeries(), make_summed()))
    vm = "uuid-4242"
    assert find(series, "kvm_vcpu_stat_exits_total", vm=vm) == 7
    assert find(series, "kvm_vcpu_stat_halt_wait_ns_seconds_total", vm=vm) == 1.5e-6
    assert find(series, "kvm_vm_stat_pages_bytes", vm=vm) == 3 * 4096


def test_histograms_are_cumulative_and_in_base_units() -> None:
    series = parse_both(collect(StatSeries(), make_summed()))
    buckets = {
        bound: find(series, "kvm_vcpu_stat_halt_wait_hist_seconds_bucket", vm="uuid-4242", le=bound)
        for bound in ("1e-09", "2e-09", "4e-09", "+Inf")
    }
    assert buckets == {"1e-09": 5, "2e-09": 5, "4e-09": 7, "+Inf": 8}
    sizes = {
        bound: find(series, "kvm_vm_stat_sizes_bytes_bucket", vm="uuid-4242", le=bound)
        for bound in ("5120.0", "10240.0", "+Inf")
    }
    assert sizes == {"5120.0": 1, "10240.0": 1, "+Inf": 3}
    assert not [name for name, _ in series if name.endswith(("_sum", "_count"))]


def test_each_vcpu_has_its_own() -> None:
    series = parse_both(collect(StatSeries(), make_split()))
    vm = "uuid-4242"
    assert [find(series, "kvm_vcpu_stat_exits_total", vm=vm, vcpu=str(index)) for index in range(2)] == [7, 8]
    assert [find(series, "kvm_vcpu_stat_guest_mode", vm=vm, vcpu=str(index)) for index in range(2)] == [0, 1]
    last = [
        find(series, "kvm_vcpu_stat_halt_wait_hist_seconds_bucket", vm=vm, vcpu=str(index), le=bound)
        for index in range(2)
        for bound in ("2e-09", "+Inf")
    ]
    assert last == [5, 8, 2, 4]


def test_vms_of_all_sources_are_in_one_family() -> None:
    other = StatTable(VM, (), (WAIT, EXITS))
    by_debugfs = add_statistics(make_reading(pid=4243), VmStatistics(other, None, (10, 20)))
    families = collect(StatSeries(), make_summed(), by_debugfs)
    series = parse_both(families)
    assert len({family.metric.name for family in families}) == len(families)
    assert find(series, "kvm_vcpu_stat_exits_total", vm="uuid-4243") == 20
    assert not [name for name, labels in series if ("vm", "uuid-4243") in labels and "pages" in name]


def test_what_was_not_read_is_absent() -> None:
    unread = add_statistics(make_reading(pid=4244), VmStatistics(OF_VMS, (1, 1, 1, 1), None))
    series = parse_both(collect(StatSeries(), make_summed(), unread, make_reading(pid=4245)))
    assert {name for name, labels in series if ("vm", "uuid-4244") in labels} == {
        "kvm_vm_stat_pages_bytes",
        "kvm_vm_stat_sizes_bytes_bucket",
    }
    assert not [name for name, labels in series if ("vm", "uuid-4245") in labels]


def test_lines_follow_what_moves_comes_and_goes() -> None:
    kept = StatSeries()
    for readings in (
        [make_summed()],
        [make_summed(exits=8)],
        [make_summed(exits=8), make_summed(pid=1, exits=9)],
        [make_summed(pid=1, exits=9)],
        [],
        [make_summed()],
    ):
        assert render_text(collect(kept, *readings)) == render_text(collect(StatSeries(), *readings))


@given(st.integers(0, 2**64 - 1))
def test_a_whole_number_keeps_all_its_digits(value: int) -> None:
    (line,) = [
        line
        for line in render_text(collect(StatSeries(), make_summed(exits=value))).splitlines()
        if "stat_exits_total{" in line
    ]
    assert line == f'kvm_vcpu_stat_exits_total{{vm="uuid-4242"}} {value}'


def test_a_percent_sign_in_a_vms_name_is_one() -> None:
    series = parse_both(StatSeries().collect([("100%d", make_summed())]))
    assert find(series, "kvm_vcpu_stat_exits_total", vm="100%d") == 7


class Reader:
    """Gives one snapshot for ever."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def read(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        """Hold nothing."""


def open_collector(*readings: VmReading, enabled: Sequence[str] = COLLECTORS) -> HostCollector:
    settings = CollectorSettings(enabled=frozenset(enabled))
    return HostCollector(Reader(make_snapshot(*readings)), settings, BuildInfo("", "", ""), lambda: 0.0)


def test_a_vm_whose_columns_make_no_sense_costs_its_own(caplog: pytest.LogCaptureFixture) -> None:
    short = add_statistics(make_reading(pid=7), VmStatistics(OF_VCPUS, None, None, ((1,),) * 6))
    twin = replace(make_split(), vcpus=(Vcpu(0, 0, None), Vcpu(0, 2, None)))
    twin = replace(twin, vm=replace(twin.vm, id="twin", key=twin.vm.key._replace(pid=8)))
    series = parse_both(open_collector(make_split(), short, twin, enabled=["stats"]).collect())
    assert {dict(labels)["vm"] for name, labels in series if "_stat_" in name} == {"uuid-4242"}
    assert find(series, "kvm_exporter_scrape_collector_success", collector="stats") == 1


def test_what_is_left_out_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    odd = tuple(LeftOut(f"vcpu/odd{number}", "unit", "unit 7 is not known") for number in range(2))
    reading = add_statistics(make_reading(), VmStatistics(replace(OF_VMS, left_out=odd), (3, 1, 0, 2), None))
    collector = open_collector(reading)
    for _ in range(2):
        series = parse_both(collector.collect())
        assert find(series, "kvm_exporter_statistics_left_out", reason="unit") == 2
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.fields["statistic"] for record in told] == ["vcpu/odd0", "vcpu/odd1"]  # type: ignore[attr-defined]


def test_without_the_collector_there_are_none() -> None:
    families = open_collector(make_summed(), enabled=["vm", "vcpu"]).collect()
    assert not [family for family in families if "_stat_" in family.metric.name]
