"""Two snapshots of a host, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import replace

from exporter.top.comparison import Comparison
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Snapshot, VmReading
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatTable, StatUnit, VmStatistics
from tests.snapshots import make_reading, make_snapshot

VM, VCPU = StatScope.VM, StatScope.VCPU
HALTS = StatDescriptor(VCPU, "halt_exits", StatKind.CUMULATIVE)
BLOCKED = StatDescriptor(VCPU, "blocking_ns", StatKind.CUMULATIVE, StatUnit.SECONDS, 10, -9)
MODE = StatDescriptor(VCPU, "guest_mode", StatKind.INSTANT, StatUnit.BOOLEAN)
HIST = StatDescriptor(VCPU, "halt_wait_hist", StatKind.LOG_HISTOGRAM, StatUnit.SECONDS, 10, -9, size=3)
FLUSHES = StatDescriptor(VM, "remote_tlb_flush", StatKind.CUMULATIVE)
PAGES = StatDescriptor(VM, "pages_4k", StatKind.INSTANT)
SPLIT = StatTable(VCPU, (FLUSHES, PAGES), (HIST, HALTS, BLOCKED, MODE))
SUMMED = StatTable(VM, (FLUSHES,), (HIST, HALTS, BLOCKED))


def make_vm(
    name: str = "web",
    pid: int = 4242,
    *,
    notify: tuple[int, ...] = (3, 0),
    halts: tuple[int, ...] = (10, 20),
    blocked: tuple[int, ...] = (0, 0),
    flushes: int = 5,
) -> VmReading:
    """A VM of which every vCPU was read."""
    reading = make_reading(name, notify, pid)
    zeros = (0,) * len(notify)
    columns = (zeros, zeros, zeros, halts, blocked, tuple(index % 2 for index in range(len(notify))))
    statistics = VmStatistics(SPLIT, (flushes, 77), None, columns)
    return replace(reading, counters=reading.counters._replace(statistics=statistics))


def make_summed(name: str = "old", pid: int = 4343, *, notify: int = 1, halts: int = 30) -> VmReading:
    """A VM of which only sums were read."""
    reading = make_reading(name, (0, 0), pid)
    statistics = VmStatistics(SUMMED, (5,), (0, 0, 0, halts, 0), None)
    counters = reading.counters._replace(
        per_vcpu={}, totals={NOTIFY_WINDOW_EXITS: notify, EXITS: 100 + notify}, statistics=statistics
    )
    return replace(reading, source="debugfs", vcpus=(), counters=counters)


def later(snapshot: Snapshot, seconds: float) -> Snapshot:
    return replace(
        snapshot,
        monotonic_seconds=snapshot.monotonic_seconds + seconds,
        unix_seconds=snapshot.unix_seconds + seconds,
    )


def compare(before: list[VmReading], now: list[VmReading], seconds: float = 2.0) -> Comparison:
    return Comparison(later(make_snapshot(*now), seconds), make_snapshot(*before))
