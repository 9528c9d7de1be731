"""Which VMs of a snapshot have series of their own, each with what is kept of its lines, and what is new of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Protocol, TypeVar

from exporter.history.changes import NotifyCounters, find_notify_counters
from exporter.prometheus.selection import CollectorSettings
from exporter.prometheus.vm_series import ShownVm, VmSeries, find_protection
from kvm.model import Snapshot, VmKey, VmReading
from kvm.read_errors import ReadErrors

T = TypeVar("T")


class AskVms(Protocol):
    """What asks VMs for something."""

    def __call__(self, vms: Iterable[ShownVm], ask: Callable[[VmSeries, VmReading], T]) -> Iterable[tuple[ShownVm, T]]:
        """Give each VM with its answer; those that make no sense are left out."""
        ...


class Change(Enum):
    """What has changed from one snapshot to the next, apart from counters that nothing but their own lines shows.

    ``NOTIFY_COUNTERS``: only those of notify exits. ``ANYTHING``: VMs, vCPUs, or how they are protected, too.
    """

    NOTHING = 0
    NOTIFY_COUNTERS = 1
    ANYTHING = 2


class ShownVms:
    """Keeps the lines of VMs from snapshot to snapshot; a VM whose id another one has is recorded in ``errors``."""

    def __init__(self, settings: CollectorSettings, errors: ReadErrors) -> None:
        self._settings, self._errors = settings, errors
        self.shown: list[ShownVm] = []
        """The VMs that are to be shown, in the order of the newest snapshot, each label ``vm`` once."""
        self._lines: dict[VmKey, tuple[VmSeries, bool]] = {}
        self._composition: object = None
        self._protections: list[tuple[object, ...]] = []
        self._notify_counters: NotifyCounters = ([], [])

    def take(self, snapshot: Snapshot) -> Change:
        """Take in a snapshot, and tell what has changed since the one before."""
        is_alike = snapshot.composition is self._composition
        arranged = self._arrange_as_before(snapshot, is_alike=is_alike)
        protections = self._protections if is_alike else [*map(find_protection, snapshot.readings)]
        notify_counters = find_notify_counters(snapshot)
        change = Change.NOTHING
        if not arranged or protections != self._protections:
            change = Change.ANYTHING
        elif notify_counters != self._notify_counters:
            change = Change.NOTIFY_COUNTERS
        self.shown = arranged or list(self._arrange(snapshot))
        self._composition, self._protections = snapshot.composition, protections
        self._notify_counters = notify_counters
        return change

    def _arrange_as_before(self, snapshot: Snapshot, *, is_alike: bool) -> list[ShownVm]:
        """Arrange the VMs where all are those of the scrape before, in its order: a third of the time; [] elsewhere."""
        kept, readings = self._lines.values(), snapshot.readings
        if len(kept) != len(readings):
            return []
        if not is_alike and not all(map(VmSeries.fits, [lines for lines, _ in kept], readings)):
            return []
        return [(reading, lines) for reading, (lines, shown) in zip(readings, kept, strict=True) if shown]

    def _arrange(self, snapshot: Snapshot) -> Iterator[ShownVm]:
        kept, self._lines = self._lines, {}
        labels = set()
        for reading in snapshot.readings:
            vm = reading.vm
            lines, shown = kept.get(vm.key, (None, False))
            if lines is None or not lines.fits(reading):
                lines = VmSeries(reading, self._settings.vcpu_series, self._settings.vm_labels)
                shown = self._settings.shows(vm)
            if lines.vm_label in labels:
                message = f"another VM has the id {vm.id!r} too"
                self._errors.record(reading.source, vm.key, "duplicate_vm", message)
                continue
            labels.add(lines.vm_label)
            self._lines[vm.key] = (lines, shown)
            if shown:
                yield reading, lines
