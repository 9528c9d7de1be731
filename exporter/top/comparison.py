"""What every statistic does now: two snapshots of a host, compared.

A rate takes two snapshots in which the same source read the same vCPUs. Where it cannot be had it is None, which is
shown as ``-``: it is never 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Snapshot, VmKey, VmReading
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatTable

T = TypeVar("T")

NOTIFY_KEY: Final = f"{StatScope.VCPU}/{NOTIFY_WINDOW_EXITS}"
EXITS_KEY: Final = f"{StatScope.VCPU}/{EXITS}"
# Every source reads them, whatever else it can.
COUNTERS: Final = {
    NOTIFY_KEY: StatDescriptor(StatScope.VCPU, NOTIFY_WINDOW_EXITS, StatKind.CUMULATIVE),
    EXITS_KEY: StatDescriptor(StatScope.VCPU, EXITS, StatKind.CUMULATIVE),
}


class Subject(NamedTuple):
    """What has statistics: a VM, or the vCPU at ``position`` of ``reading.vcpus``."""

    reading: VmReading
    position: int | None = None


class Comparison:
    """The newest snapshot, and the one before it if there is one. Values are raw, rates in units per second.

    ``statistics`` are those that can be asked for, by their keys: all that were read, without histograms.
    """

    def __init__(self, now: Snapshot, before: Snapshot | None = None) -> None:
        self.now = now
        self.seconds = now.monotonic_seconds - before.monotonic_seconds if before else 0.0
        self._before: dict[VmKey, VmReading] = {}
        if before and self.seconds > 0:
            self._before = {reading.vm.key: reading for reading in before.readings}
        self._places: dict[int, dict[str, int]] = {}
        self.statistics: dict[str, StatDescriptor] = dict(COUNTERS)
        for reading in now.readings:
            if reading.counters.statistics:
                self._learn(reading.counters.statistics.table)

    def _learn(self, table: StatTable) -> None:
        if id(table) not in self._places:
            self._find_places(table)
            self.statistics |= {
                descriptor.key: descriptor
                for descriptor in (*table.vm, *table.vcpu)
                if not descriptor.is_histogram and descriptor.key not in COUNTERS
            }

    def _find_places(self, table: StatTable) -> dict[str, int]:
        """Return where the values of each statistic begin."""
        places = self._places.get(id(table))
        if places is None:  # the snapshots keep their tables alive, so that no other has this id
            places = self._places[id(table)] = {
                key: at for descriptors in (table.vm, table.vcpu) for key, at in _list_places(descriptors)
            }
        return places

    def find_value(self, subject: Subject, key: str) -> int | None:
        """Return a statistic's value; of a VM the sum over its vCPUs, if all were read and it makes sense."""
        reading, position = subject
        column = self._find_column(reading, key)
        if position is not None:
            return None if column is None or position >= len(column) else column[position]
        if column is None:
            return self._find_total(reading, key)
        is_whole = len(column) == reading.vcpu_count and key in self.statistics and self.statistics[key].is_cumulative
        return sum(column) if is_whole else None

    def find_rate(self, subject: Subject, key: str) -> float | None:
        """Return how fast a statistic grows, per second; None for one that does not only grow."""
        reading, position = subject
        before = self._before.get(reading.vm.key)
        descriptor = self.statistics.get(key)
        if before is None or before.source != reading.source or descriptor is None or not descriptor.is_cumulative:
            return None
        if before.counters.vcpu_ids != reading.counters.vcpu_ids:
            return None
        growth = self._find_growth(before, reading, position, key)
        return None if growth is None else float(growth * descriptor.scale) / self.seconds

    def find_amount(self, subject: Subject, key: str) -> float | None:
        """Return what tells how much of it there is: the rate of what only grows, else the value, in units."""
        descriptor = self.statistics.get(key)
        if descriptor is None:  # of a source that works no more
            return None
        if descriptor.is_cumulative:
            return self.find_rate(subject, key)
        value = self.find_value(subject, key)
        return None if value is None else float(value * descriptor.scale)

    def _find_growth(self, before: VmReading, now: VmReading, position: int | None, key: str) -> int | None:
        new, old = self._find_column(now, key), self._find_column(before, key)
        if position is None and (new is None or old is None):
            return _subtract(self._find_total(now, key), self._find_total(before, key))
        if new is None or old is None or len(new) != len(old):
            return None
        if position is not None:
            return _subtract(new[position], old[position]) if position < len(new) else None
        if len(new) != now.vcpu_count:
            return None
        if new is old:
            return 0
        growths = [later - earlier for later, earlier in zip(new, old, strict=True)]
        return None if min(growths, default=0) < 0 else sum(growths)  # one of them was reset

    def _find_column(self, reading: VmReading, key: str) -> Sequence[int] | None:
        """Return a number of each vCPU that was read, None where the source has none."""
        if key in COUNTERS:
            return reading.counters.per_vcpu.get(COUNTERS[key].name)
        statistics = reading.counters.statistics
        if statistics is None or statistics.vcpu_columns is None or not key.startswith(f"{StatScope.VCPU}/"):
            return None
        return _pick(statistics.vcpu_columns, self._find_places(statistics.table).get(key))

    def _find_total(self, reading: VmReading, key: str) -> int | None:
        """Return a number of the whole VM, as the source gives it."""
        if key in COUNTERS:
            return reading.counters.totals.get(COUNTERS[key].name)
        statistics = reading.counters.statistics
        if statistics is None:
            return None
        values = statistics.vm if key.startswith(f"{StatScope.VM}/") else statistics.vcpu_sums
        return _pick(values, self._find_places(statistics.table).get(key)) if values is not None else None


def _list_places(descriptors: Sequence[StatDescriptor]) -> Iterator[tuple[str, int]]:
    at = 0
    for descriptor in descriptors:
        yield descriptor.key, at
        at += descriptor.size


def _pick(values: Sequence[T], place: int | None) -> T | None:
    return values[place] if place is not None and place < len(values) else None


def _subtract(now: int | None, then: int | None) -> int | None:
    return None if now is None or then is None or now < then else now - then
