"""From a look to families: what is there, what is absent, and what one fault costs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from exporter.build_info import BuildInfo
from exporter.patterns import compile_pattern, find_re2
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.selection import DEFAULT_COLLECTORS, BadSelection, CollectorSettings, select_collectors
from exporter.prometheus.vm_series import VcpuSeries, VmLabels
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Host,
    Identity,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vcpu,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from kvm.simulated.host import SimulatedHost
from tests.snapshots import CLOSED, HIDDEN

HOST = Host("6.12", "GenuineIntel", "6", "143", "8", "Xeon", "0x2b", "none", "kvm_intel", True)
OWNER = Owner("qemu", "web", "uuid-1", project="shop", identity=Identity.LIBVIRT, uid=64055)
NOW = 1_800_000_000.0
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def make_reading(
    name: str = "a",
    notify: Iterable[int] | None = (0, 0),
    exits: Iterable[int] | None = (10, 20),
    *,
    pid: int = 100,
    count: int | None = 2,
    source: str = "bpf",
    protection: Protection = Protection.ARMED,
    totals: Mapping[str, int] | None = None,
    owner: Owner = OWNER,
    window_cycles: int | None = None,
) -> VmReading:
    columns = {NOTIFY_WINDOW_EXITS: notify, EXITS: exits}
    per_vcpu = {statistic: tuple(column) for statistic, column in columns.items() if column is not None}
    read = max((len(column) for column in per_vcpu.values()), default=0)
    # KVM's ids are not the guest's numbers: here they are twice as high.
    vcpus = tuple(Vcpu(index, 2 * index, 1000 + index) for index in range(read))
    counters = VmCounters(
        vcpu_ids=tuple(vcpu.vcpu_id for vcpu in vcpus),
        tids=tuple(vcpu.tid for vcpu in vcpus),
        per_vcpu=per_vcpu,
        totals=totals or {},
        notify_window_cycles=window_cycles,
    )
    vm = Vm(name, VmKey(pid, 1, 9), owner, NOW - 50.5)
    return VmReading(vm, source, vcpus, count, counters, protection)


def make_snapshot(*readings: VmReading) -> Snapshot:
    return Snapshot(
        1.0, NOW, HOST, readings, (SourceReport("bpf", True), SourceReport("debugfs", False, "lockdown")), {}
    )


class Script:
    """A reader that shows prepared looks, one after the other, the last one for ever."""

    def __init__(self, *looks: Snapshot | Exception) -> None:
        self._looks = list(looks)
        self.closed = False

    def read(self) -> Snapshot:
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if isinstance(look, Exception):
            raise look
        return look

    def close(self) -> None:
        self.closed = True


def open_collector(*looks: Snapshot | Exception, settings: CollectorSettings | None = None) -> HostCollector:
    return HostCollector(
        Script(*looks), settings or CollectorSettings(), BuildInfo("1.2", "abc", "3.11.2"), time.perf_counter
    )


def parse_series(collector: HostCollector, selected: Iterable[str] | None = None) -> Series:
    """Take a look and return its series, each of which is there once."""
    text = render_text(collector.collect(None if selected is None else frozenset(selected)))
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            assert series not in found
            found[series] = float(sample.value)  # so it is to prometheus_client before its 0.22
    return found


def find(series: Series, name: str, /, **labels: str) -> float | None:
    return series.get((name, frozenset(labels.items())))


def names(series: Series) -> set[str]:
    return {name for name, _ in series}


def test_counters_of_each_vcpu_by_the_guests_numbers() -> None:
    series = parse_series(open_collector(make_snapshot(make_reading(notify=(3, 2**63)))))
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="a", vcpu="0") == 3
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="a", vcpu="1") == float(2**63)
    assert find(series, "kvm_vcpu_exits_total", vm="a", vcpu="1") == 20
    assert find(series, "kvm_vm_notify_window_exits_total", vm="a") == float(2**63 + 3)


def test_what_a_vm_is() -> None:
    series = parse_series(open_collector(make_snapshot(make_reading(window_cycles=128_000))))
    labels = {
        "name": "web",
        "display_name": "",
        "vm_namespace": "",
        "pid": "100",
        "project": "shop",
        "uuid": "uuid-1",
        "vm": "a",
    }
    assert find(series, "kvm_vm_info", vmm="qemu", identity="libvirt", uid="64055", **labels) == 1
    assert find(series, "kvm_vm_claimed_info", vm="a", display_name="", vm_namespace="", project="shop") is None
    assert find(series, "kvm_vm_source_info", vm="a", source="bpf") == 1
    assert find(series, "kvm_vm_start_time_seconds", vm="a") == NOW - 50.5
    assert find(series, "kvm_vm_vcpus", vm="a") == 2
    assert find(series, "kvm_vm_notify_window_cycles", vm="a") == 128_000
    states = {state: find(series, "kvm_vm_notify_protection", vm="a", state=state) for state in Protection}
    assert states == {"armed": 1, "off": 0, "unsupported": 0, "unknown": 0}


@pytest.mark.parametrize("identity", [Identity.CMDLINE, Identity.CLAIMED])
def test_what_nobody_vouches_for_says_not_whose_a_vm_is(identity: Identity) -> None:
    reading = make_reading()
    owner = replace(OWNER, identity=identity, uid=None, namespace="kube-system")
    claimed = replace(reading, vm=replace(reading.vm, owner=owner))
    series = parse_series(open_collector(make_snapshot(claimed)))
    facts = {"name": "web", "uuid": "uuid-1", "vmm": "qemu", "pid": "100", "vm": "a"}
    nothing = {"display_name": "", "vm_namespace": "", "project": "", "uid": ""}
    assert find(series, "kvm_vm_info", identity=str(identity), **nothing, **facts) == 1
    assert find(series, "kvm_vm_claimed_info", vm="a", display_name="", vm_namespace="kube-system", project="shop") == 1


def test_ids_are_the_same_series_without_names_and_owners() -> None:
    names_of = ("name", "display_name", "project", "vm_namespace")

    def collect(vm_labels: VmLabels) -> str:
        host = SimulatedHost(lambda: 1000.0, lambda: NOW)
        settings = CollectorSettings(vm_labels=vm_labels)
        return render_text(HostCollector(host, settings, BuildInfo("", "", ""), lambda: 0.0).collect())

    full, ids = collect(VmLabels.FULL), collect(VmLabels.IDS)
    assert ids != full
    assert ids == re.sub(rf'\b({"|".join(names_of)})="[^"]*"', r'\1=""', full)
    claimed = re.compile(r"^kvm_vm_claimed_info\{.*\} 1$", re.MULTILINE)
    assert len(claimed.findall(ids)) == len(claimed.findall(full)) > 0  # that something is claimed is no name


@pytest.mark.parametrize("protection", [Protection.OFF, Protection.UNKNOWN, Protection.UNSUPPORTED])
def test_window_is_shown_of_an_armed_vm_only(protection: Protection) -> None:
    reading = make_reading(window_cycles=0, protection=protection)
    assert "kvm_vm_notify_window_cycles" not in names(parse_series(open_collector(make_snapshot(reading))))


def test_vm_that_nobody_could_read_is_there_without_numbers() -> None:
    reading = make_reading(notify=None, exits=None, source="", protection=Protection.UNKNOWN, count=4)
    series = parse_series(open_collector(make_snapshot(reading)))
    assert {name for name in names(series) if name.startswith(("kvm_vm_", "kvm_vcpu_"))} == {
        "kvm_vm_info",
        "kvm_vm_vcpus",
        "kvm_vm_notify_protection",
        "kvm_vm_start_time_seconds",
    }
    assert find(series, "kvm_vm_vcpus", vm="a") == 4


def test_nothing_unknown_is_shown() -> None:
    reading = make_reading(notify=None, exits=None, source="", count=None)
    reading = replace(reading, vm=replace(reading.vm, start_time_seconds=None))
    snapshot = replace(make_snapshot(reading), host=replace(HOST, notify_supported=None))
    series = parse_series(open_collector(snapshot))
    assert {name for name in names(series) if name.startswith("kvm_vm_")} == {"kvm_vm_info", "kvm_vm_notify_protection"}
    assert "kvm_host_notify_supported" not in names(series)
    assert find(series, "kvm_host_vms", protection="armed") == 1
    assert find(series, "kvm_host_vcpus", protection="armed") is None
    assert find(series, "kvm_host_vcpus", protection="off") == 0


@pytest.mark.parametrize(("notify", "exits"), [((1, 2), None), (None, (1, 2))])
def test_statistic_that_was_not_read_is_absent(notify: tuple[int, ...] | None, exits: tuple[int, ...] | None) -> None:
    series = names(parse_series(open_collector(make_snapshot(make_reading(notify=notify, exits=exits)))))
    assert ("kvm_vcpu_notify_window_exits_total" in series) == (notify is not None)
    assert ("kvm_vm_notify_window_exits_total" in series) == (notify is not None)
    assert ("kvm_vcpu_exits_total" in series) == (exits is not None)


def test_sum_wants_every_vcpu_or_a_source_that_sums() -> None:
    partly = make_reading("partly", (5, 6), count=3)
    unknown = make_reading("unknown", (5, 6), count=None, pid=101)
    summed = make_reading("summed", None, None, count=3, pid=102, totals={NOTIFY_WINDOW_EXITS: 9})
    series = parse_series(open_collector(make_snapshot(partly, unknown, summed)))
    assert find(series, "kvm_vm_notify_window_exits_total", vm="partly") is None
    assert find(series, "kvm_vm_notify_window_exits_total", vm="unknown") is None
    assert find(series, "kvm_vm_notify_window_exits_total", vm="summed") == 9
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="partly", vcpu="1") == 6


def test_host() -> None:
    readings = (make_reading("a"), make_reading("b", pid=101, protection=Protection.OFF), make_reading("c", pid=102))
    series = parse_series(open_collector(make_snapshot(*readings)))
    assert find(series, "kvm_host_notify_supported") == 1
    assert [find(series, "kvm_host_vms", protection=state) for state in Protection] == [2, 1, 0, 0]
    assert [find(series, "kvm_host_vcpus", protection=state) for state in Protection] == [4, 2, 0, 0]
    labels = {"cpu_family": "6", "cpu_model": "143", "cpu_model_name": "Xeon", "cpu_stepping": "8"}
    labels |= {"cpu_vendor": "GenuineIntel", "kernel": "6.12", "kvm_module": "kvm_intel"}
    assert find(series, "kvm_host_info", lockdown="none", microcode="0x2b", **labels) == 1
    assert find(series, "kvm_host_notify_window_exits_total") == 0


def test_a_cpu_that_is_not_known_has_no_series_and_costs_no_other() -> None:
    snapshot = make_snapshot(make_reading())
    unknown = replace(snapshot, host=replace(snapshot.host, cpu_unknown_reason="/proc/cpuinfo cannot be read"))
    before, now = (names(parse_series(open_collector(each))) for each in (snapshot, unknown))
    assert before - now == {"kvm_host_info"}
    assert find(parse_series(open_collector(unknown)), "kvm_exporter_scrape_collector_success", collector="host") == 1


def test_host_with_processes_that_could_not_be_looked_at_counts_nothing() -> None:
    series = names(parse_series(open_collector(replace(make_snapshot(make_reading()), blind_spots=HIDDEN))))
    assert not {"kvm_host_vms", "kvm_host_vcpus"} & series
    assert "kvm_vm_info" in series


def test_host_where_no_source_works_claims_no_increases() -> None:
    """Neither before it could count any, nor, by a total that stands still, while it cannot."""
    down = replace(make_snapshot(), sources=(SourceReport("bpf", False),), blind_spots=HIDDEN)
    well = make_snapshot(make_reading(notify=(4, 0))), make_snapshot(make_reading(notify=(4, 3)))
    collector = open_collector(down, *well, down, well[1])
    totals = [find(parse_series(collector), "kvm_host_notify_window_exits_total") for _ in range(5)]
    assert totals == [None, 0, 3, None, 3]


def test_movements_are_dated_and_added_up() -> None:
    looks = [make_snapshot(make_reading(notify=(4, 0))), make_snapshot(make_reading(notify=(4, 3))), make_snapshot()]
    looks = [replace(look, unix_seconds=NOW + number) for number, look in enumerate(looks)]
    collector = open_collector(*looks)
    assert "kvm_vcpu_last_notify_exit_timestamp_seconds" not in names(parse_series(collector))
    series = parse_series(collector)
    assert find(series, "kvm_vcpu_last_notify_exit_timestamp_seconds", vm="a", vcpu="1") == NOW + 1
    assert find(series, "kvm_vcpu_last_notify_exit_timestamp_seconds", vm="a", vcpu="0") is None
    assert find(series, "kvm_host_notify_window_exits_total") == 3
    assert find(parse_series(collector), "kvm_host_notify_window_exits_total") == 3


def test_sources_and_errors() -> None:
    snapshot = replace(make_snapshot(), errors={("stats_fd", "malformed"): 4, ("owners", "xml"): 1})
    series = parse_series(open_collector(snapshot))
    assert find(series, "kvm_exporter_source_up", source="bpf") == 1
    assert find(series, "kvm_exporter_source_up", source="debugfs") == 0
    assert find(series, "kvm_exporter_read_errors_total", source="stats_fd", kind="malformed") == 4
    assert find(series, "kvm_exporter_read_errors_total", source="owners", kind="xml") == 1
    assert find(series, "kvm_exporter_build_info", version="1.2", revision="abc", python_version="3.11.2") == 1


def test_vcpu_series_active_are_those_with_notify_exits() -> None:
    settings = CollectorSettings(vcpu_series=VcpuSeries.ACTIVE)
    looks = [make_snapshot(make_reading(notify=notify, exits=(7, 8))) for notify in ((0, 0), (0, 2), (1, 2), (5, 2))]
    collector = open_collector(*looks, settings=settings)
    assert not any(name.startswith("kvm_vcpu") for name in names(parse_series(collector)))
    series = parse_series(collector)
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="a", vcpu="1") == 2
    assert find(series, "kvm_vcpu_exits_total", vm="a", vcpu="1") == 8
    assert find(series, "kvm_vcpu_exits_total", vm="a", vcpu="0") is None
    assert find(parse_series(collector), "kvm_vcpu_exits_total", vm="a", vcpu="0") == 7
    series = parse_series(collector)
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="a", vcpu="0") == 5
    assert find(series, "kvm_vm_notify_window_exits_total", vm="a") == 7


def test_vcpu_series_none() -> None:
    looks = [make_snapshot(make_reading(notify=(0, number))) for number in range(3)]
    collector = open_collector(*looks, settings=CollectorSettings(vcpu_series=VcpuSeries.NONE))
    for number in range(3):
        series = parse_series(collector)
        assert not any(name.startswith("kvm_vcpu") for name in names(series))
        assert find(series, "kvm_vm_notify_window_exits_total", vm="a") == number


@pytest.mark.parametrize(
    ("include", "exclude", "shown"),
    [
        (None, None, {"id-1", "id-2", "id-3"}),
        ("web", None, {"id-1", "id-2"}),
        ("^web$", None, {"id-1"}),
        ("id-3", None, {"id-3"}),
        (None, "web", {"id-3"}),
        ("web", "test", {"id-1"}),
        ("nothing", None, set()),
    ],
)
def test_vms_are_chosen_by_name_or_id(include: str | None, exclude: str | None, shown: set[str]) -> None:
    readings = [
        make_reading(f"id-{number}", pid=number, owner=replace(OWNER, name=name))
        for number, name in enumerate(("web", "web-test", "db"), start=1)
    ]
    wanted, unwanted = (text and compile_pattern(text, find_re2()) for text in (include, exclude))
    settings = CollectorSettings(vm_include=wanted or None, vm_exclude=unwanted or None)
    series = parse_series(open_collector(make_snapshot(*readings), settings=settings))
    assert {dict(labels)["vm"] for _, labels in series if "vm" in dict(labels)} == shown
    assert find(series, "kvm_host_vms", protection="armed") == 3


def test_what_changes_is_shown_at_once() -> None:
    first = make_reading()
    owned = replace(first, vm=replace(first.vm, owner=replace(OWNER, name="renamed")))
    hotplugged = make_reading(notify=(0, 0, 9), exits=(1, 1, 1), count=3)
    collector = open_collector(*map(make_snapshot, (first, owned, hotplugged)))
    parse_series(collector)
    assert ("name", "renamed") in {pair for _, labels in parse_series(collector) for pair in labels}
    series = parse_series(collector)
    assert find(series, "kvm_vcpu_notify_window_exits_total", vm="a", vcpu="2") == 9
    assert find(series, "kvm_vm_vcpus", vm="a") == 3


def test_equal_readings_made_anew_are_recognized() -> None:
    collector = open_collector(*[make_snapshot(make_reading(exits=(number, number))) for number in range(3)])
    for number in range(3):
        assert find(parse_series(collector), "kvm_vcpu_exits_total", vm="a", vcpu="1") == number


def test_hostile_names_stay_labels() -> None:
    name = 'x"} 1\nevil_total{a="%s%d\\'
    reading = make_reading(name, owner=replace(OWNER, name=name, project="\0\ud800"))
    series = parse_series(open_collector(make_snapshot(reading)))
    assert find(series, "kvm_vcpu_exits_total", vm=name, vcpu="0") == 10
    assert not any(series_name.startswith("evil") for series_name in names(series))


def test_two_vms_with_one_id_are_one_and_an_error(caplog: pytest.LogCaptureFixture) -> None:
    # The last two differ in what the exposition cannot show.
    readings = [make_reading(name, pid=pid) for pid, name in enumerate(("a", "a", "b\udc80", "b\udc81"), start=1)]
    collector = open_collector(make_snapshot(*readings))
    parse_series(collector)
    series = parse_series(collector)
    assert {dict(labels)["pid"] for name, labels in series if name == "kvm_vm_info"} == {"1", "3"}
    assert find(series, "kvm_exporter_read_errors_total", source="bpf", kind="duplicate_vm") == 4
    assert find(series, "kvm_host_vms", protection="armed") == 4
    assert len(caplog.records) == 2


def test_vms_are_counted_anew_when_one_goes_that_was_not_shown() -> None:
    first, same_id = make_reading("a", pid=1), make_reading("a", pid=2)
    collector = open_collector(make_snapshot(first, same_id), make_snapshot(first), make_snapshot(first, same_id))
    counts = [find(parse_series(collector), "kvm_host_vms", protection="armed") for _ in range(3)]
    assert counts == [2, 1, 2]


@pytest.mark.parametrize(
    "broken",
    [
        make_reading("broken", (1, 2, 3), (1, 2), pid=7),
        replace(make_reading("broken", pid=7), vcpus=(Vcpu(0, 0, None), Vcpu(0, 2, None))),
        replace(make_reading("broken", pid=7), vcpus=(Vcpu(0, 0, None),)),
    ],
    ids=["columns", "indexes", "vcpus"],
)
def test_vm_that_makes_no_sense_costs_its_own_vcpu_series(broken: VmReading, caplog: pytest.LogCaptureFixture) -> None:
    collector = open_collector(make_snapshot(make_reading(), broken))
    parse_series(collector)
    series = parse_series(collector)
    assert {dict(labels)["vm"] for name, labels in series if name.startswith("kvm_vcpu_")} == {"a"}
    assert find(series, "kvm_exporter_read_errors_total", source="bpf", kind="malformed") == 2
    assert find(series, "kvm_vm_vcpus", vm="broken") == 2
    assert find(series, "kvm_exporter_scrape_collector_success", collector="vcpu") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


COLUMNS = st.sampled_from([(0, 0), (0, 3), (5, 6), (5,), None])
READINGS = st.builds(
    make_reading,
    st.just(""),
    COLUMNS,
    COLUMNS,
    count=st.sampled_from([2, 3]),
    source=st.sampled_from(["bpf", "stats_fd"]),
    protection=st.sampled_from([Protection.ARMED, Protection.OFF]),
    totals=st.sampled_from([{}, {NOTIFY_WINDOW_EXITS: 7}]),
    window_cycles=st.sampled_from([None, 100]),
)
# Of two VMs, the second not always there; each look twice, as what has not changed at all is kept as well.
LOOKS = st.lists(st.tuples(READINGS, READINGS | st.none()), min_size=2, max_size=6)


@given(LOOKS, st.sampled_from(VcpuSeries))
@example([(make_reading("", notify, (5, 6)), None) for notify in ((5, 6), (0, 3))], VcpuSeries.ACTIVE)
@settings(max_examples=300)
def test_what_is_kept_of_vms_is_what_would_be_made_anew(
    looks: list[tuple[VmReading, VmReading | None]], mode: VcpuSeries
) -> None:
    snapshots = [
        make_snapshot(*(rename(reading, name) for name, reading in zip("ab", of_vms, strict=True) if reading))
        for of_vms in looks
        for _ in range(2)
    ]
    with_series, errors = CollectorSettings(vcpu_series=mode), 0.0
    keeps = open_collector(*snapshots, settings=with_series)
    for snapshot in snapshots:
        kept, anew = parse_series(keeps), parse_series(open_collector(snapshot, settings=with_series))
        errors += count_malformed(anew)
        assert count_malformed(kept) == errors
        assert drop_history(kept) == drop_history(anew)


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=8))
@example([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
@example([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
def test_each_vcpu_has_the_time_of_its_own_last_exit(steps: list[list[int]]) -> None:
    """Whether all of two VMs move at once, some, or none; a source gives the same ids while nothing changes."""
    vms = {
        name: make_reading(name, notify=(0,) * count, exits=None, pid=100 + count, count=count)
        for name, count in (("a", 3), ("b", 2))
    }
    columns: list[tuple[int, ...]] = [(0,) * 5]
    for growth in steps:
        columns.append(tuple(value + more for value, more in zip(columns[-1], growth, strict=True)))
    snapshots = []
    for number, column in enumerate(columns):
        readings = [
            replace(vms[name], counters=vms[name].counters._replace(per_vcpu={NOTIFY_WINDOW_EXITS: numbers}))
            for name, numbers in (("a", column[:3]), ("b", column[3:]))
        ]
        snapshots.append(replace(make_snapshot(*readings), unix_seconds=NOW + number))
    collector = open_collector(*snapshots)
    vcpus = [("a", "0"), ("a", "1"), ("a", "2"), ("b", "0"), ("b", "1")]
    wanted: list[float | None] = [None] * 5
    for number, growth in enumerate([[0] * 5, *steps]):
        wanted = [NOW + number if more else before for more, before in zip(growth, wanted, strict=True)]
        series = parse_series(collector)
        told = [find(series, "kvm_vcpu_last_notify_exit_timestamp_seconds", vm=vm, vcpu=vcpu) for vm, vcpu in vcpus]
        assert told == wanted


class FailsOnce(str):
    """A VM's id that cannot be printed once, when it is asked for the ``fails_at``-th time."""

    __slots__ = ()
    asked = fails_at = 0

    def translate(self, table: Any) -> str:  # noqa: ANN401
        FailsOnce.asked += 1
        if FailsOnce.asked == FailsOnce.fails_at:
            raise MemoryError
        return super().translate(table)


@pytest.mark.parametrize("fails_at", range(2, 15))
def test_a_vm_whose_naming_failed_once_has_all_its_series_in_the_next_scrape(fails_at: int) -> None:
    """The first time is when the VM is met; after that, whatever has failed is tried again, though nothing moved."""
    FailsOnce.asked, FailsOnce.fails_at = 0, fails_at
    reading = make_reading("a", (1, 2), (3, 4))
    collector = open_collector(make_snapshot(rename(reading, FailsOnce("a"))))
    parse_series(collector)
    assert FailsOnce.asked >= fails_at
    kept, anew = (
        {key: value for key, value in drop_history(parse_series(opened)).items() if "malformed" not in str(key)}
        for opened in (collector, open_collector(make_snapshot(rename(reading, "a"))))
    )
    assert kept == anew


class UnreadOnce(dict[str, tuple[int, ...]]):
    """A VM's counters that cannot be read once, when one is asked for the second time."""

    asked = 0

    def get(self, statistic: str, default: Any = None) -> Any:  # noqa: ANN401
        self.asked += 1
        if self.asked == 2:
            raise MemoryError
        return super().get(statistic, default)


def test_a_snapshot_that_could_not_be_taken_in_is_made_up_for_by_the_next_though_nothing_has_moved() -> None:
    before, after = make_reading("a", (1, 1)), make_reading("a", (3, 1))
    fails = replace(after, counters=after.counters._replace(per_vcpu=UnreadOnce(after.counters.per_vcpu)))
    collector = open_collector(*map(make_snapshot, (before, fails, after)))
    parse_series(collector)
    assert find(parse_series(collector), "kvm_exporter_scrape_collector_success", collector="snapshot") == 0
    series = parse_series(collector)
    assert collector.total == 2
    assert find(series, "kvm_vcpu_last_notify_exit_timestamp_seconds", vm="a", vcpu="0") == NOW
    assert find(series, "kvm_vm_notify_window_exits_total", vm="a") == 4


def count_malformed(series: Series) -> float:
    return sum(value for (_, labels), value in series.items() if ("kind", "malformed") in labels)


def rename(reading: VmReading, name: str) -> VmReading:
    return replace(reading, vm=Vm(name, VmKey(ord(name), 1, 9), OWNER, NOW - 50.5))


def drop_history(series: Series) -> Series:
    """The series but those about what only a collector with a past can know, and how long it took."""
    history = ("notify_window_exits_total", "last_notify_exit", "read_errors", "duration_seconds")
    kept = {"kvm_vcpu_notify_window_exits_total", "kvm_vm_notify_window_exits_total"}
    return {
        key: value for key, value in series.items() if key[0] in kept or not any(word in key[0] for word in history)
    }


def test_a_vm_whose_series_cannot_be_named_costs_no_other_its_own() -> None:
    """Its vCPUs have one number, all of them move at once, and then its counters are not read."""
    fine, twins = make_reading("fine", (0, 0)), make_reading("twins", (0, 0), pid=200)
    twins = replace(twins, vcpus=tuple(replace(vcpu, index=0) for vcpu in twins.vcpus))

    def count(reading: VmReading, notify: tuple[int, ...] | None) -> VmReading:
        columns = {} if notify is None else {NOTIFY_WINDOW_EXITS: notify}
        return replace(reading, counters=reading.counters._replace(per_vcpu=columns))

    looks = [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((3, 3), None)]
    snapshots = [make_snapshot(count(fine, one), count(twins, other)) for one, other in looks]
    collector = open_collector(*(replace(look, unix_seconds=NOW + at) for at, look in enumerate(snapshots)))
    for _ in range(2):
        parse_series(collector)
    series = parse_series(collector)
    assert find(series, "kvm_exporter_scrape_collector_success", collector="vcpu") == 1
    assert find(series, "kvm_vcpu_last_notify_exit_timestamp_seconds", vm="fine", vcpu="1") == NOW + 2


def test_failed_look_costs_one_scrape_and_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    collector = open_collector(make_snapshot(make_reading()), OSError("boom"), make_snapshot(make_reading()))
    assert find(parse_series(collector), "kvm_exporter_scrape_collector_success", collector="snapshot") == 1
    series = parse_series(collector)
    for name in ("snapshot", *DEFAULT_COLLECTORS):
        assert find(series, "kvm_exporter_scrape_collector_success", collector=name) == 0
    assert not any(name.startswith(("kvm_vm", "kvm_vcpu", "kvm_host")) for name in names(series))
    assert find(series, "kvm_exporter_complete") == 0
    assert find(series, "kvm_exporter_incomplete_reason_info", reason="snapshot_failed") == 1
    assert "kvm_exporter_build_info" in names(series)
    assert [(record.levelname, bool(record.exc_info)) for record in caplog.records] == [
        ("ERROR", False),
        ("DEBUG", True),
    ]
    assert "kvm_vcpu_exits_total" in names(parse_series(collector))


def test_failed_collector_leaves_the_others_whole() -> None:
    errors: Any = {("bpf", "malformed"): "many"}
    collector = open_collector(replace(make_snapshot(make_reading()), errors=errors))
    series = parse_series(collector)
    successes = {
        name: find(series, "kvm_exporter_scrape_collector_success", collector=name) for name in DEFAULT_COLLECTORS
    }
    assert successes == {"host": 1, "vm": 1, "vcpu": 1, "exporter": 0}
    assert "kvm_exporter_source_up" not in names(series)
    assert {"kvm_vm_info", "kvm_vcpu_exits_total", "kvm_host_info"} <= names(series)


OF_EXPORTER = ("kvm_exporter_source_up", "kvm_exporter_complete", "kvm_exporter_snapshot")


@pytest.mark.parametrize("name", DEFAULT_COLLECTORS)
def test_each_collector_can_be_had_alone(name: str) -> None:
    prefixes: dict[str, str | tuple[str, ...]] = {
        "host": "kvm_host_",
        "vm": "kvm_vm_",
        "vcpu": "kvm_vcpu_",
        "exporter": OF_EXPORTER,
    }
    collector = open_collector(make_snapshot(make_reading()))
    own = {found for found in names(parse_series(collector)) if found.startswith(prefixes[name])}
    series = parse_series(collector, [name])
    always = {"duration_seconds", "success"}
    assert names(series) == own | {"kvm_exporter_build_info"} | {
        f"kvm_exporter_scrape_collector_{found}" for found in always
    }
    assert {dict(labels).get("collector") for _, labels in series} >= {"snapshot", name}
    assert set(DEFAULT_COLLECTORS) & {dict(labels).get("collector") for _, labels in series} == {name}


def test_durations_come_from_the_clock() -> None:
    ticks = iter(range(100))
    reader = Script(make_snapshot())
    collector = HostCollector(reader, CollectorSettings(), BuildInfo("", "", ""), lambda: float(next(ticks)))
    series = parse_series(collector)
    for name in ("snapshot", *DEFAULT_COLLECTORS):
        assert find(series, "kvm_exporter_scrape_collector_duration_seconds", collector=name) == 1
    collector.close()
    assert reader.closed


def test_selection() -> None:
    enabled = frozenset(DEFAULT_COLLECTORS) - {"exporter"}
    assert select_collectors(enabled, [], []) == enabled
    assert select_collectors(enabled, ["vm", "host"], []) == {"vm", "host"}
    assert select_collectors(enabled, [], ["vm", "exporter"]) == {"host", "vcpu"}
    for collect, exclude in ((["vm"], ["vm"]), (["disk"], []), ([], ["disk"]), (["exporter"], []), ([""], [])):
        with pytest.raises(BadSelection):
            select_collectors(enabled, collect, exclude)


def test_last_look_is_kept_for_pages() -> None:
    collector = open_collector(make_snapshot())
    assert not collector.sources
    collector.collect()
    assert [report.source for report in collector.sources] == ["bpf", "debugfs"]


def test_ten_thousand_vcpus() -> None:
    host = SimulatedHost(vm_count=625, vcpus_per_vm=16)
    collector = HostCollector(host, CollectorSettings(), BuildInfo("", "", ""), time.perf_counter)
    series = parse_series(collector)
    # One VM in six is made up as read by its sum only.
    vms_with_vcpus = 625 - 625 // 6
    assert sum(name == "kvm_vcpu_notify_window_exits_total" for name, _ in series) == 16 * vms_with_vcpus
    assert sum(name == "kvm_vm_notify_window_exits_total" for name, _ in series) == 625
    assert sum(name == "kvm_vm_notify_protection" for name, _ in series) == 4 * 625


def test_the_total_goes_on_from_that_of_the_agent_before() -> None:
    first, second = make_snapshot(make_reading(notify=(3, 0))), make_snapshot(make_reading(notify=(5, 1)))
    collector = HostCollector(
        Script(first, second), CollectorSettings(), BuildInfo("", "", ""), time.perf_counter, first_total=4711
    )
    for total in (4711, 4714):
        assert parse_series(collector)["kvm_host_notify_window_exits_total", frozenset()] == total
        assert collector.total == total
    # What was never read is not known, whatever was before.
    blind = replace(make_snapshot(), blind_spots=HIDDEN, sources=(CLOSED,))
    collector = HostCollector(
        Script(blind), CollectorSettings(), BuildInfo("", "", ""), time.perf_counter, first_total=4711
    )
    assert ("kvm_host_notify_window_exits_total", frozenset[tuple[str, str]]()) not in parse_series(collector)
