"""Whether and which notify counters have changed between two snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvm.model import NOTIFY_WINDOW_EXITS, Snapshot, Vcpu, VmKey, VmReading


class Moved(NamedTuple):
    """A VM with vCPUs whose counters have moved since ``before_seconds``: each with what it was and what it is."""

    reading: VmReading
    before_seconds: float
    vcpus: list[tuple[Vcpu, int, int]]


class CounterChanges:
    """The notify counters of the newest snapshot."""

    def __init__(self) -> None:
        self._columns: dict[VmKey, tuple[float, tuple[Vcpu, ...], tuple[int, ...]]] = {}

    def observe(self, snapshot: Snapshot) -> Iterator[Moved]:
        """Yield where something has moved since the snapshot before; a VM that is seen for the first time has not."""
        before, self._columns = self._columns, {}
        for reading in snapshot.readings:
            column = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
            if column is None or len(column) != len(reading.vcpus):
                continue
            key = reading.vm.key
            self._columns[key] = (snapshot.monotonic_seconds, reading.vcpus, column)
            last = before.get(key)
            if last is None or last[2] == column:
                continue
            seconds, vcpus, values = last
            if reading.vcpus is not vcpus:
                known = dict(zip((vcpu.vcpu_id for vcpu in vcpus), values, strict=True))
                # A vCPU that was not there before has been plugged in: it counts from 0.
                values = tuple(known.get(vcpu.vcpu_id, 0) for vcpu in reading.vcpus)
            moved = [found for found in zip(reading.vcpus, values, column, strict=True) if found[1] != found[2]]
            if moved:
                yield Moved(reading, seconds, moved)


NotifyCounters = tuple[list[tuple[int, ...] | None], list[int | None]]
"""Those of all VMs of a snapshot, in their order: the columns of their vCPUs, and sums; None where unread."""


def find_notify_counters(snapshot: Snapshot) -> NotifyCounters:
    """Find the notify counters of all VMs.

    Equal lists say that none has moved, of two snapshots with the same VMs and vCPUs.
    """
    counters = [reading.counters for reading in snapshot.readings]
    columns = [of_vm.per_vcpu.get(NOTIFY_WINDOW_EXITS) for of_vm in counters]
    return columns, [of_vm.totals.get(NOTIFY_WINDOW_EXITS) for of_vm in counters]
