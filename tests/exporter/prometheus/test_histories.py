"""A collector that has seen much, and has kept what it could of that, tells what one tells that has seen nothing.

Only what was seen to move is another matter: a tracker that looks at each VM of each snapshot anew tells that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.build_info import BuildInfo
from exporter.history.increases import IncreaseTracker
from exporter.monitor.figure_columns import FigureColumns
from exporter.prometheus import metrics
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import Family, render_sample, render_text
from exporter.prometheus.selection import CollectorSettings
from exporter.prometheus.vm_series import VcpuSeries
from exporter.stalls.verdicts import MonitorReport, State, VcpuFigures
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Identity,
    Owner,
    Protection,
    Snapshot,
    Vcpu,
    VcpuKey,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from tests.reports import make_report
from tests.snapshots import INTEL, UP

COLLECTORS = frozenset({"host", "vm", "vcpu"})
# They follow from what was seen before, or from the clock.
OF_HISTORY = (metrics.VCPU_LAST_NOTIFY_EXIT, metrics.HOST_NOTIFY_WINDOW_EXITS)
UNTOLD = (metrics.SCRAPE_DURATION, *OF_HISTORY)
QUIET = VcpuFigures(State.QUIET, None, 0, 0, can_judge=True)
START = 1_800_000_000.0


class SimulatedVm:
    """A VM with its vCPUs, and what of it is seen."""

    def __init__(self, number: int, vcpus: int) -> None:
        owner = Owner("qemu", f"vm-{number}", identity=Identity.LIBVIRT)
        self.vm = Vm(f"vm-{number}", VmKey(number + 1, 1, 9), owner, START - 100)
        self.notify, self.exits = [0] * vcpus, [10] * vcpus
        self.is_there = self.is_read = True
        self.is_summed = False
        self.protection = Protection.ARMED
        self.columns = FigureColumns()
        self.figures: dict[int, VcpuFigures] = {}
        self.change()

    def change(self) -> None:
        """Have what is told of its vCPUs other objects than before."""
        self.vcpus = tuple(Vcpu(index, 2 * index, 100 * self.vm.key.pid + index) for index in range(len(self.notify)))
        self.vcpu_ids = tuple(vcpu.vcpu_id for vcpu in self.vcpus)
        self.tids = tuple(vcpu.tid for vcpu in self.vcpus)

    def put(self, vcpu_id: int, figures: VcpuFigures) -> None:
        """Have the monitor tell this of a vCPU."""
        self.columns.put(vcpu_id, figures)
        self.figures[vcpu_id] = figures

    def drop(self, vcpu_id: int) -> None:
        """Have the monitor tell of a vCPU no more."""
        self.columns.drop(vcpu_id)
        self.figures.pop(vcpu_id, None)

    def read(self) -> VmReading:
        """Read it, as the source tells of it now."""
        per_vcpu = {NOTIFY_WINDOW_EXITS: tuple(self.notify), EXITS: tuple(self.exits)} if self.is_read else {}
        counters = VmCounters(self.vcpu_ids, self.tids, per_vcpu, {}, 0, 1)
        if self.is_summed:
            totals = {NOTIFY_WINDOW_EXITS: sum(self.notify)}
            return VmReading(self.vm, "debugfs", (), len(self.vcpus), VmCounters(totals=totals), self.protection)
        return VmReading(self.vm, "bpf", self.vcpus, len(self.vcpus), counters, self.protection)


class SimulatedHost:
    """Takes snapshots of a few VMs, and tells what the monitor has found; it keeps what a real source would keep."""

    def __init__(self, vcpus: tuple[int, ...]) -> None:
        """``vcpus`` are how many each VM has."""
        self.vms = [SimulatedVm(number, of_vm) for number, of_vm in enumerate(vcpus)]
        self.start = START
        self.report = MonitorReport()
        self.composition = object()
        self.now = 0.0

    def read(self) -> Snapshot:
        """Take a snapshot."""
        readings = tuple(vm.read() for vm in self.vms if vm.is_there)
        snapshot = Snapshot(self.now, self.start + self.now, INTEL, readings, (UP,), {})
        return replace(snapshot, composition=self.composition)

    def read_report(self) -> MonitorReport:
        """Tell what was found."""
        figures = {vm.vm.key: vm.columns.find() for vm in self.vms if vm.figures}
        return replace(self.report, figures=figures)

    def close(self) -> None:
        """Hold nothing."""


Step = Callable[[SimulatedHost], object]
NUMBERS = st.integers(0, 2)


def move_all(host: SimulatedHost) -> None:
    for vm in host.vms:
        vm.notify = [value + 1 + at for at, value in enumerate(vm.notify)]


def flood(host: SimulatedHost) -> None:
    """What is new from one scrape to the next where every vCPU takes notify exits."""
    move_exits(host)
    move_all(host)
    trace_all(host)


def move_exits(host: SimulatedHost) -> None:
    for vm in host.vms:
        vm.exits = [value + 1 for value in vm.exits]


def trace_all(host: SimulatedHost) -> None:
    for vm in host.vms:
        for vcpu_id, figures in list(vm.figures.items()):
            vm.put(vcpu_id, figures._replace(traced_exits=figures.traced_exits + 1))


def track_all(host: SimulatedHost) -> None:
    for vm in host.vms:
        for vcpu_id in vm.vcpu_ids:
            vm.put(vcpu_id, vm.figures.get(vcpu_id, QUIET))


def move_vm(number: int) -> Step:
    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.notify = [value + 2 for value in vm.notify]

    return step


def set_vcpu(number: int, place: int, value: int) -> Step:
    def step(host: SimulatedHost) -> None:
        notify = host.vms[number % len(host.vms)].notify
        notify[place % len(notify)] = value

    return step


def put_figures(number: int, vcpu_id: int, figures: VcpuFigures | None) -> Step:
    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.drop(vcpu_id) if figures is None else vm.put(vcpu_id, figures)

    return step


def change_vm(number: int, name: str, value: object) -> Step:
    """Change more than numbers: then a source gives other objects."""

    def step(host: SimulatedHost) -> None:
        setattr(host.vms[number % len(host.vms)], name, value)
        host.composition = object()

    return step


def plug(number: int) -> Step:
    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.notify, vm.exits = [*vm.notify, 0][:4], [*vm.exits, 0][:4]
        vm.change()
        host.composition = object()

    return step


def tell(fields: dict[str, Any]) -> Step:
    def step(host: SimulatedHost) -> None:
        host.report = replace(host.report, **fields)

    return step


def slew_clock(host: SimulatedHost) -> None:
    host.start += 0.3


def compose_anew(host: SimulatedHost) -> None:
    host.composition = object()


FIGURES = st.builds(
    VcpuFigures, st.sampled_from(State), st.sampled_from([None, 90.0, 91.0]), NUMBERS, NUMBERS, st.booleans()
)
REPORTS: list[dict[str, Any]] = [
    {"problem": "no tracepoint"},
    {"problem": ""},
    {"missed_vcpus": frozenset({VcpuKey(VmKey(1, 1, 9), 0)})},
    {"missed_vcpus": frozenset()},
    {"context_invalid": {}},
    {"context_invalid": {(1, 1, 100, 0): 3}},
    {"context_invalid": None},
    {"vcpus": (make_report(vm=Vm("vm-0", VmKey(1, 1, 9), Owner("qemu"), None), drill=True),)},
    {"vcpus": ()},
]
USUAL = st.sampled_from([flood, flood, move_all, move_exits, trace_all, track_all])
STEPS: st.SearchStrategy[Step] = st.one_of(
    USUAL,
    USUAL,
    st.builds(move_vm, NUMBERS),
    st.builds(set_vcpu, NUMBERS, NUMBERS, st.integers(0, 9)),
    st.builds(put_figures, NUMBERS, st.sampled_from([0, 2, 4, 6]), st.none() | FIGURES),
    st.builds(change_vm, NUMBERS, st.sampled_from(["is_there", "is_read", "is_summed"]), st.booleans()),
    st.builds(change_vm, NUMBERS, st.just("protection"), st.sampled_from(Protection)),
    st.builds(plug, NUMBERS),
    st.builds(tell, st.sampled_from(REPORTS)),
    st.just(slew_clock),
    st.just(compose_anew),
)


def open_collector(host: SimulatedHost, series: VcpuSeries) -> HostCollector:
    chosen = CollectorSettings(vcpu_series=series)
    return HostCollector(host, chosen, BuildInfo("1", "", "3"), time.perf_counter, host.read_report)


def read_lines(families: list[Family]) -> list[str]:
    return sorted(render_text(family for family in families if family.metric not in UNTOLD).splitlines())


def find_moves(tracker: IncreaseTracker, snapshot: Snapshot) -> list[bytes]:
    """Find when each vCPU of a snapshot was seen to move."""
    lines = []
    for reading in snapshot.readings:
        moves = tracker.last_moves(reading.vm.key)
        vcpus = [vcpu for vcpu in reading.vcpus if vcpu.vcpu_id in moves]
        for vcpu in vcpus:
            labels = str(vcpu.index), reading.vm.id
            lines.append(render_sample(metrics.VCPU_LAST_NOTIFY_EXIT, labels, moves[vcpu.vcpu_id]))
    return sorted(lines)


@pytest.mark.parametrize("series", VcpuSeries)
@settings(max_examples=150, deadline=None)
@given(vcpus=st.sampled_from([(2, 1, 3), (2,)]), steps=st.lists(STEPS, min_size=1, max_size=25))
def test_what_was_kept_is_what_would_be_made_anew(
    series: VcpuSeries, vcpus: tuple[int, ...], steps: list[Step]
) -> None:
    host = SimulatedHost(vcpus)
    collector, tracker = open_collector(host, series), IncreaseTracker()
    for number, step in enumerate([compose_anew, *steps]):
        host.now = float(number)
        step(host)
        tracker.observe(replace(host.read(), composition=object()))
        families = collector.collect(COLLECTORS)
        assert read_lines(families) == read_lines(open_collector(host, series).collect(COLLECTORS))
        assert collector.total == tracker.increases_total
        if series is VcpuSeries.ALL:
            told = [
                line for of in families if of.metric is OF_HISTORY[0] for line in b"".join(of.chunks).splitlines(True)
            ]
            assert sorted(told) == find_moves(tracker, host.read())
