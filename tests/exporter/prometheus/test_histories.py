"""A collector that has seen much, and has kept what it could of that, tells what one tells that has seen nothing.

Only what was seen to move is another matter: a tracker that looks at each VM of each snapshot anew tells that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
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
from kvm.counters.retried_source import BEST_RETRY_SECONDS
from kvm.discovery.vm_discovery import Discovery, HeldVm
from kvm.errors import SourceUnavailable
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Identity,
    Owner,
    Snapshot,
    VcpuKey,
    Vm,
    VmCounters,
    VmKey,
)
from kvm.read_errors import ReadErrors
from kvm.snapshot import HostReader
from tests.reports import make_report
from tests.snapshots import INTEL

COLLECTORS = frozenset({"host", "vm", "vcpu"})
# They follow from what was seen before, or from the clock.
OF_HISTORY = (metrics.VCPU_LAST_NOTIFY_EXIT, metrics.HOST_NOTIFY_WINDOW_EXITS)
UNTOLD = (metrics.SCRAPE_DURATION, metrics.VM_START_TIME, *OF_HISTORY)
QUIET = VcpuFigures(State.QUIET, None, 0, 0, can_judge=True)
START = 1_800_000_000.0


class SimulatedVm:
    """A VM with its vCPUs, and what a source tells of it: the same objects while nothing changes."""

    def __init__(self, number: int, vcpus: int) -> None:
        self.key = VmKey(number + 1, 1, 9)
        self.owner = Owner("qemu", f"vm-{number}", uuid=f"uuid-{number}", identity=Identity.LIBVIRT)
        self.notify, self.exits = [0] * vcpus, [10] * vcpus
        self.is_there = self.is_read = True
        self.is_summed = False
        self.flags: int | None = 1
        self.columns = FigureColumns()
        self.figures: dict[int, VcpuFigures] = {}
        self.place_vcpus()

    def place_vcpus(self) -> None:
        """Give each of its vCPUs an id and a thread."""
        self.vcpu_ids = tuple(2 * index for index in range(len(self.notify)))
        self.tids = tuple(100 * self.key.pid + vcpu_id for vcpu_id in self.vcpu_ids)

    def put(self, vcpu_id: int, figures: VcpuFigures) -> None:
        """Have the monitor tell this of a vCPU."""
        self.columns.put(vcpu_id, figures)
        self.figures[vcpu_id] = figures

    def drop(self, vcpu_id: int) -> None:
        """Have the monitor tell of a vCPU no more."""
        self.columns.drop(vcpu_id)
        self.figures.pop(vcpu_id, None)

    def sum(self) -> VmCounters:
        """Read it as a source that has no numbers of single vCPUs."""
        return VmCounters(totals={NOTIFY_WINDOW_EXITS: sum(self.notify)})

    def read(self) -> VmCounters:
        """Read it as a source that sees the whole host."""
        if self.is_summed:
            return self.sum()
        per_vcpu = {NOTIFY_WINDOW_EXITS: tuple(self.notify), EXITS: tuple(self.exits)} if self.is_read else {}
        return VmCounters(self.vcpu_ids, self.tids, per_vcpu, {}, 0, self.flags)


class SimulatedHost:
    """A few VMs, and what the monitor has found of them."""

    def __init__(self, vcpus: tuple[int, ...]) -> None:
        """``vcpus`` are how many each VM has."""
        self.vms = [SimulatedVm(number, of_vm) for number, of_vm in enumerate(vcpus)]
        self.start, self.now = START, 0.0
        self.report = MonitorReport()
        self.is_seen_whole = True

    def find_present(self) -> list[SimulatedVm]:
        """Find the VMs that are there."""
        return [vm for vm in self.vms if vm.is_there]

    def read_report(self) -> MonitorReport:
        """Tell what was found."""
        figures = {vm.key: vm.columns.find() for vm in self.vms if vm.figures}
        return replace(self.report, figures=figures)


class SimulatedSource:
    """A source that reads such a host: as a whole, or the sums of the VMs that others have found."""

    limits = doubt = ""

    def __init__(self, host: SimulatedHost, *, finds_vms: bool) -> None:
        self.name, self.finds_vms = ("bpf", True) if finds_vms else ("debugfs", False)
        self._host = host

    def open(self) -> None:
        if self.finds_vms and not self._host.is_seen_whole:
            raise SourceUnavailable("it does not work for a while")

    def read(self, vms: Sequence[HeldVm], *, again: bool = False) -> dict[VmKey, VmCounters]:
        del vms, again
        self.open()
        return {vm.key: vm.read() if self.finds_vms else vm.sum() for vm in self._host.find_present()}

    def close(self) -> None:
        """Hold nothing."""


class SimulatedDiscovery(Discovery):
    """Finds the VMs of such a host."""

    def __init__(self, host: SimulatedHost) -> None:
        super().__init__(Path("/nowhere"), lambda _pid, _kind, _message: None)
        self._host = host
        self.sees_first_process = True

    def find_vms(self) -> list[HeldVm]:
        return [HeldVm(vm.key, vm.key.pid, -1, vm.vcpu_ids, {}) for vm in self._host.find_present()]


class DatedReader:
    """The reader of a real host, reading a simulated one; its snapshots have the time of that."""

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self._reader = HostReader(
            [SimulatedSource(host, finds_vms=True), SimulatedSource(host, finds_vms=False)],
            SimulatedDiscovery(host),
            lambda _wanted, _wait: {vm.key[:2]: vm.owner for vm in host.vms},
            ReadErrors(),
            proc=Path("/nowhere"),
            kvm_debugfs=Path("/nowhere"),
            kvm_module=Path("/nowhere"),
            kvm_device=Path("/nowhere"),
            read_host=lambda: INTEL,
            monotonic=lambda: host.now,
        )

    def read(self) -> Snapshot:
        snapshot = self._reader.read()
        return replace(
            snapshot, monotonic_seconds=self._host.now, unix_seconds=self._host.start + self._host.now, errors={}
        )

    def close(self) -> None:
        self._reader.close()


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
    def step(host: SimulatedHost) -> None:
        setattr(host.vms[number % len(host.vms)], name, value)

    return step


def plug(number: int) -> Step:
    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.notify, vm.exits = [*vm.notify, 0][:4], [*vm.exits, 0][:4]
        vm.place_vcpus()

    return step


def change_thread(number: int) -> Step:
    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.tids = (vm.tids[0] + 1, *vm.tids[1:])

    return step


def rename(number: int) -> Step:
    """Have another VM take a VM's place."""

    def step(host: SimulatedHost) -> None:
        vm = host.vms[number % len(host.vms)]
        vm.key = vm.key._replace(start_ticks=vm.key.start_ticks + 1)
        vm.owner = replace(vm.owner, uuid=f"{vm.owner.uuid}x")

    return step


def list_otherwise(host: SimulatedHost) -> None:
    host.vms.reverse()


def lose_sight(host: SimulatedHost) -> None:
    """Have the first source fail, or come again once it is tried."""
    host.is_seen_whole = not host.is_seen_whole
    host.now += BEST_RETRY_SECONDS


def tell(fields: dict[str, Any]) -> Step:
    def step(host: SimulatedHost) -> None:
        host.report = replace(host.report, **fields)

    return step


def slew_clock(host: SimulatedHost) -> None:
    host.start += 0.3


def stand_still(_host: SimulatedHost) -> None:
    """Have nothing happen."""


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
    st.builds(change_vm, NUMBERS, st.just("flags"), st.sampled_from([None, 0, 1])),
    st.builds(plug, NUMBERS),
    st.builds(change_thread, NUMBERS),
    st.builds(rename, NUMBERS),
    st.sampled_from([list_otherwise, lose_sight]),
    st.builds(tell, st.sampled_from(REPORTS)),
    st.just(slew_clock),
    st.just(stand_still),
)


def open_collector(host: SimulatedHost, series: VcpuSeries) -> HostCollector:
    chosen = CollectorSettings(vcpu_series=series)
    return HostCollector(DatedReader(host), chosen, BuildInfo("1", "", "3"), time.perf_counter, host.read_report)


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
    for step in [stand_still, *steps]:
        host.now += 1.0
        step(host)
        families = collector.collect(COLLECTORS)
        assert read_lines(families) == read_lines(open_collector(host, series).collect(COLLECTORS))
        assert collector.snapshot is not None
        tracker.observe(replace(collector.snapshot, composition=object()))
        assert collector.total == tracker.increases_total
        if series is VcpuSeries.ALL:
            told = [of for of in families if of.metric is metrics.VCPU_LAST_NOTIFY_EXIT]
            lines = [line for of in told for line in b"".join(of.chunks).splitlines(True)]
            assert sorted(lines) == find_moves(tracker, collector.snapshot)
