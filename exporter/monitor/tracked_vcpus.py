"""The vCPUs that have taken a notify exit since the agent started: which are active, and which are missing.

Everything is done per VM, not per vCPU, so that a VM of a thousand vCPUs costs no more than a thousand VMs of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

from exporter.monitor.tracked_vcpu import Counts, TrackedVcpu, find_window
from exporter.stalls.verdicts import State, VmFigures
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, VcpuKey, VmKey, VmReading

# A VM or a vCPU that is missing from a snapshot may be back in the next.
MISSING_SECONDS: Final = 60.0
_NEVER: Final = float("inf")


class _TrackedVm:
    """The tracked vCPUs of one VM, by vcpu_id, and what metrics tell of them.

    ``changed`` are those whose figures may be others than those that were found last. Only they are looked at: in a
    flood of notify exits a scrape would touch ten thousand vCPUs, of which fifty have changed.
    """

    def __init__(self) -> None:
        self.vcpus: dict[int, TrackedVcpu] = {}
        self.changed: set[int] = set()
        self._figures = VmFigures({}, 0)

    def find_figures(self) -> VmFigures:
        """Return what metrics tell of them; one thread at a time, while another may change them."""
        if not self.changed:
            return self._figures
        vcpus, stalled, taken = dict(self._figures.vcpus), self._figures.stalled, set[int]()
        try:
            for vcpu_id in list(self.changed):  # each once, however much changes meanwhile
                self.changed.discard(vcpu_id)  # before it is looked at: what changes after that is for the next time
                taken.add(vcpu_id)
                before, vcpu = vcpus.get(vcpu_id), self.vcpus.get(vcpu_id)
                stalled -= before is not None and before.state is State.STALLED
                if vcpu is not None:
                    now = vcpus[vcpu_id] = vcpu.figures
                    stalled += now.state is State.STALLED
                else:
                    vcpus.pop(vcpu_id, None)
            self._figures = VmFigures(vcpus, stalled)
        except BaseException:
            self.changed |= taken
            raise
        return self._figures


class TrackedVcpus:
    """The tracked vCPUs; ``active`` are those whose counters are read each second. Iterates from any thread."""

    def __init__(self) -> None:
        self.active: dict[VcpuKey, TrackedVcpu] = {}
        self._by_vm: dict[VmKey, _TrackedVm] = {}
        self._finding = threading.Lock()
        self._changed: set[VmKey] = set()
        """The VMs of which some vCPU has changed since figures were last asked for."""
        self._figures: dict[VmKey, VmFigures] = {}
        self._missing: dict[VcpuKey, float] = {}

    def __iter__(self) -> Iterator[TrackedVcpu]:
        """Iterate over all that are tracked now; ``list`` of a dict's values is one step of the interpreter."""
        for vm in list(self._by_vm.values()):
            yield from list(vm.vcpus.values())

    def get(self, key: VcpuKey) -> TrackedVcpu | None:
        """Return a tracked vCPU, None where it is not tracked."""
        return self.of_vm(key.vm).get(key.vcpu_id)

    def of_vm(self, key: VmKey) -> Mapping[int, TrackedVcpu]:
        """Return the tracked vCPUs of a VM, by vcpu_id."""
        vm = self._by_vm.get(key)
        return {} if vm is None else vm.vcpus

    def find_figures(self) -> dict[VmKey, VmFigures]:
        """Return what metrics tell of all that are tracked now; from any thread."""
        with self._finding:
            for key in list(self._changed):  # each once, however much changes meanwhile
                self._changed.discard(key)  # before it is looked at: what changes after that is for the next time
                try:
                    vm = self._by_vm.get(key)
                    if vm is None:
                        self._figures.pop(key, None)
                    else:
                        self._figures[key] = vm.find_figures()
                except BaseException:
                    self._changed.add(key)
                    raise
            return dict(self._figures)

    def _note_change(self, vm: _TrackedVm, key: VcpuKey) -> None:
        vm.changed.add(key.vcpu_id)
        self._changed.add(key.vm)  # last: whoever finds it finds the vCPU

    def add(self, vcpu: TrackedVcpu) -> None:
        """Begin to track a vCPU."""
        vm = self._by_vm.get(vcpu.key.vm)
        if vm is None:
            vm = self._by_vm[vcpu.key.vm] = _TrackedVm()
        vm.vcpus[vcpu.key.vcpu_id] = vcpu
        vcpu.detector.on_change = partial(self._note_change, vm, vcpu.key)
        vcpu.detector.on_change()

    def renew(self, readings: Mapping[VmKey, VmReading], now: float) -> list[tuple[TrackedVcpu, Counts | None]]:
        """Take in a snapshot; returns each vCPU with its counters, None where the snapshot has none for it."""
        return [found for key, vm in self._by_vm.items() for found in self._renew_vm(readings.get(key), vm, now)]

    def _renew_vm(
        self, reading: VmReading | None, vm: _TrackedVm, now: float
    ) -> Iterator[tuple[TrackedVcpu, Counts | None]]:
        if reading is None:
            for vcpu in vm.vcpus.values():
                self._missing.setdefault(vcpu.key, now)
                yield vcpu, None
            return
        per_vcpu, window = reading.counters.per_vcpu, find_window(reading)
        notify, exits = per_vcpu.get(NOTIFY_WINDOW_EXITS, ()), per_vcpu.get(EXITS, ())
        places = {vcpu.vcpu_id: place for place, vcpu in enumerate(reading.vcpus)}
        for vcpu_id, vcpu in vm.vcpus.items():
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
                if is_other_thread:  # only now: a scrape may ask at any moment
                    self._note_change(vm, vcpu.key)
            if place < len(notify):
                yield vcpu, (notify[place], exits[place] if place < len(exits) else None)
            else:
                yield vcpu, None

    def drop(self, key: VcpuKey) -> TrackedVcpu | None:
        """Track a vCPU no more; returns it if it was tracked."""
        vm = self._by_vm.get(key.vm)
        vcpu = None if vm is None else vm.vcpus.pop(key.vcpu_id, None)
        if vm is not None:
            if not vm.vcpus:
                del self._by_vm[key.vm]
            self._note_change(vm, key)
        self.active.pop(key, None)
        self._missing.pop(key, None)
        return vcpu

    def drop_vm(self, vm: VmKey) -> list[TrackedVcpu]:
        """Track no vCPU of a VM any more; returns those that were tracked."""
        found = self._by_vm.get(vm)
        vcpus = [] if found is None else list(found.vcpus.values())
        for vcpu in vcpus:
            self.drop(vcpu.key)
        self.find_figures()  # else what is known of it would stay for as long as nobody asks
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
