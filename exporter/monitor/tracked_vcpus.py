"""The vCPUs that have taken a notify exit since the agent started: which are active, and which are missing.

Everything is done per VM, not per vCPU, so that a VM of a thousand vCPUs costs no more than a thousand VMs of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Final, NamedTuple

from exporter.monitor.figure_columns import FigureColumns
from exporter.monitor.tracked_vcpu import Counts, TrackedVcpu, find_window
from exporter.stalls.detector import ignore
from exporter.stalls.verdicts import VmFigures
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Vcpu, VcpuKey, Vm, VmKey, VmReading

# A VM or a vCPU that is missing from a snapshot may be back in the next.
MISSING_SECONDS: Final = 60.0
_NEVER: Final = float("inf")


class _Placed(NamedTuple):
    """What has been taken in of a VM that showed all of its tracked vCPUs, each with its place in the columns."""

    vm: Vm
    shown: tuple[Vcpu, ...]
    source: str
    window: int | None
    vcpus: list[tuple[TrackedVcpu, int]]

    def fits(self, reading: VmReading) -> bool:
        """Tell whether a reading has nothing new but numbers."""
        is_same = reading.vm is self.vm and reading.vcpus is self.shown and reading.source == self.source
        return is_same and find_window(reading) == self.window


class TrackedVcpus:
    """The tracked vCPUs; ``active`` are those whose counters are read each second. Iterates from any thread."""

    def __init__(self) -> None:
        self.active: dict[VcpuKey, TrackedVcpu] = {}
        self._by_vm: dict[VmKey, dict[int, TrackedVcpu]] = {}
        self._missing: dict[VcpuKey, float] = {}
        self._placed: dict[VmKey, _Placed] = {}
        self._taking = threading.Lock()
        """Held while the figures, all that follows here, are written or read."""
        self._columns: dict[VmKey, FigureColumns] = {}
        self._changed: set[VmKey] = set()
        """The VMs whose figures are others than those that were found last."""
        self._figures: dict[VmKey, VmFigures] = {}

    def __iter__(self) -> Iterator[TrackedVcpu]:
        """Iterate over all that are tracked now; ``list`` of a dict's values is one step of the interpreter."""
        for vcpus in list(self._by_vm.values()):
            yield from list(vcpus.values())

    def get(self, key: VcpuKey) -> TrackedVcpu | None:
        """Return a tracked vCPU, None where it is not tracked."""
        return self.of_vm(key.vm).get(key.vcpu_id)

    def of_vm(self, key: VmKey) -> Mapping[int, TrackedVcpu]:
        """Return the tracked vCPUs of a VM, by vcpu_id."""
        return self._by_vm.get(key, {})

    def find_figures(self) -> dict[VmKey, VmFigures]:
        """Return what metrics tell of all that are tracked now; from any thread."""
        with self._taking:
            self._renew_figures()
            return dict(self._figures)

    def renew_figures(self) -> None:
        """Find new figures soon after they have changed: the less is left to whoever asks, as a scrape in a flood."""
        with self._taking:
            self._renew_figures()

    def _renew_figures(self) -> None:
        for vm in self._changed:
            self._figures[vm] = self._columns[vm].find()
        self._changed.clear()

    def _take_figures(self, vcpu: TrackedVcpu) -> None:
        """Take in what metrics tell of a vCPU, after something of it has changed."""
        vm, vcpu_id = vcpu.key
        figures = vcpu.figures
        with self._taking:
            self._columns.setdefault(vm, FigureColumns()).put(vcpu_id, figures)
            self._changed.add(vm)

    def add(self, vcpu: TrackedVcpu) -> None:
        """Begin to track a vCPU."""
        self._placed.pop(vcpu.key.vm, None)
        self._by_vm.setdefault(vcpu.key.vm, {})[vcpu.key.vcpu_id] = vcpu
        vcpu.detector.on_change = partial(self._take_figures, vcpu)
        vcpu.detector.on_change()

    def renew(self, readings: Mapping[VmKey, VmReading], now: float) -> list[tuple[TrackedVcpu, Counts | None]]:
        """Take in a snapshot; returns each vCPU with its counters, None where the snapshot has none for it."""
        return [found for vm in self._by_vm for found in self._renew_vm(vm, readings.get(vm), now)]

    def _renew_vm(
        self, vm: VmKey, reading: VmReading | None, now: float
    ) -> Iterable[tuple[TrackedVcpu, Counts | None]]:
        placed = self._placed.get(vm)
        if reading is not None and placed is not None and placed.fits(reading):
            notify, exits = (reading.counters.per_vcpu.get(name, ()) for name in (NOTIFY_WINDOW_EXITS, EXITS))
            if len(notify) == len(exits) == len(reading.vcpus):
                return [(vcpu, (notify[place], exits[place])) for vcpu, place in placed.vcpus]
        self._placed.pop(vm, None)
        return self._renew_each(reading, self._by_vm[vm], now)

    def _renew_each(
        self, reading: VmReading | None, vcpus: Mapping[int, TrackedVcpu], now: float
    ) -> Iterator[tuple[TrackedVcpu, Counts | None]]:
        if reading is None:
            for vcpu in vcpus.values():
                self._missing.setdefault(vcpu.key, now)
                yield vcpu, None
            return
        per_vcpu, window = reading.counters.per_vcpu, find_window(reading)
        notify, exits = per_vcpu.get(NOTIFY_WINDOW_EXITS, ()), per_vcpu.get(EXITS, ())
        places = {vcpu.vcpu_id: place for place, vcpu in enumerate(reading.vcpus)}
        for vcpu_id, vcpu in vcpus.items():
            vcpu.vm, vcpu.source, vcpu.window_cycles = reading.vm, reading.source, window
            place = places.get(vcpu_id)
            # A VM that cannot be read shows none of its vCPUs.
            if place is None and reading.vcpus:
                self._missing.setdefault(vcpu.key, now)
            elif self._missing:
                self._missing.pop(vcpu.key, None)
            if place is None:
                yield vcpu, None
                continue
            shown = reading.vcpus[place]
            if vcpu.vcpu is not shown:
                is_other_thread, vcpu.vcpu = vcpu.vcpu.tid != shown.tid, shown
                if is_other_thread:
                    self._take_figures(vcpu)
            if place < len(notify):
                yield vcpu, (notify[place], exits[place] if place < len(exits) else None)
            else:
                yield vcpu, None
        if vcpus.keys() <= places.keys():
            found = [(vcpu, places[vcpu_id]) for vcpu_id, vcpu in vcpus.items()]
            self._placed[reading.vm.key] = _Placed(reading.vm, reading.vcpus, reading.source, window, found)

    def drop(self, key: VcpuKey) -> TrackedVcpu | None:
        """Track a vCPU no more; returns it if it was tracked."""
        vcpus = self._by_vm.get(key.vm, {})
        vcpu = vcpus.pop(key.vcpu_id, None)
        self._placed.pop(key.vm, None)
        with self._taking:
            if vcpus:
                self._columns[key.vm].drop(key.vcpu_id)
                self._changed.add(key.vm)
            else:
                self._by_vm.pop(key.vm, None)
                self._columns.pop(key.vm, None)
                self._figures.pop(key.vm, None)
                self._changed.discard(key.vm)
        self.active.pop(key, None)
        self._missing.pop(key, None)
        if vcpu is not None:
            vcpu.detector.on_change = ignore  # its session may end after it
        return vcpu

    def drop_vm(self, vm: VmKey) -> list[TrackedVcpu]:
        """Track no vCPU of a VM any more; returns those that were tracked."""
        vcpus = list(self.of_vm(vm).values())
        for vcpu in vcpus:
            self.drop(vcpu.key)
        return vcpus

    def list_gone(self, now: float) -> list[VcpuKey]:
        """Return the vCPUs that have been missing for so long that they are gone."""
        return [key for key, since in self._missing.items() if now - since >= MISSING_SECONDS]

    @property
    def any_missing(self) -> bool:
        """Whether the newest snapshot lacked a tracked vCPU."""
        return bool(self._missing)

    @property
    def gone_at(self) -> float:
        """When the first vCPU that is missing now will be gone; infinity where none is missing."""
        return min((since + MISSING_SECONDS for since in self._missing.values()), default=_NEVER)
