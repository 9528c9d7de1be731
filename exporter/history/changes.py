"""Which vCPUs' counters have changed between two snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvm.model import NOTIFY_WINDOW_EXITS, Snapshot, Vcpu, VmKey, VmReading


class Moved(NamedTuple):
    """A vCPU whose counter has moved: what it was when, and what it is."""

    reading: VmReading
    vcpu: Vcpu
    before: int
    before_seconds: float
    now: int


class CounterChanges:
    """The notify counters of the newest snapshot."""

    def __init__(self) -> None:
        self._columns: dict[VmKey, tuple[float, tuple[Vcpu, ...], tuple[int, ...]]] = {}

    def observe(self, snapshot: Snapshot) -> Iterator[Moved]:
        """Yield what has moved since the snapshot before; a VM that is seen for the first time has not."""
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
            yield from _compare(reading, last, column)


def _compare(
    reading: VmReading, last: tuple[float, tuple[Vcpu, ...], tuple[int, ...]], column: tuple[int, ...]
) -> Iterator[Moved]:
    seconds, vcpus, values = last
    if reading.vcpus is not vcpus:
        known = {vcpu.vcpu_id: value for vcpu, value in zip(vcpus, values, strict=True)}
        # A vCPU that was not there before has been plugged in: it counts from 0.
        values = tuple(known.get(vcpu.vcpu_id, 0) for vcpu in reading.vcpus)
    for vcpu, before, value in zip(reading.vcpus, values, column, strict=True):
        if value != before:
            yield Moved(reading, vcpu, before, seconds, value)
