"""The vCPUs that have taken a notify exit since the agent started: which are active, and which are missing.

Everything is done per VM, not per vCPU, so that a VM of a thousand vCPUs costs no more than a thousand VMs of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from exporter.monitor.tracked_vcpu import Counts, TrackedVcpu
from exporter.stalls.verdicts import VcpuFigures
from kvm.model import VcpuKey, VmKey, VmReading

# A VM or a vCPU that is missing from a snapshot may be back in the next.
MISSING_SECONDS: Final = 60.0
_NEVER: Final = float("inf")


class TrackedVcpus:
    """The tracked vCPUs; ``active`` are those whose counters are read each second. Iterates from any thread."""

    def __init__(self) -> None:
        self.active: dict[VcpuKey, TrackedVcpu] = {}
        self._by_vm: dict[VmKey, dict[int, TrackedVcpu]] = {}
        self._missing: dict[VcpuKey, float] = {}

    def __iter__(self) -> Iterator[TrackedVcpu]:
        """Iterate over all that are tracked now; ``list`` of a dict's values is one step of the interpreter."""
        for vcpus in list(self._by_vm.values()):
            yield from list(vcpus.values())

    def get(self, key: VcpuKey) -> TrackedVcpu | None:
        """Return a tracked vCPU, None where it is not tracked."""
        return self._by_vm.get(key.vm, {}).get(key.vcpu_id)

    def find_figures(self) -> dict[VmKey, dict[int, VcpuFigures]]:
        """Return what metrics tell of all that are tracked now, by VM and vcpu_id; from any thread."""
        return {
            vm: {vcpu_id: vcpu.figures for vcpu_id, vcpu in list(vcpus.items())}
            for vm, vcpus in list(self._by_vm.items())
        }

    def add(self, vcpu: TrackedVcpu) -> None:
        """Begin to track a vCPU."""
        self._by_vm.setdefault(vcpu.key.vm, {})[vcpu.key.vcpu_id] = vcpu

    def renew(self, readings: Mapping[VmKey, VmReading], now: float) -> list[tuple[TrackedVcpu, Counts | None]]:
        """Take in a snapshot; returns each vCPU with its counters, None where the snapshot has none for it."""
        return [found for vm, vcpus in self._by_vm.items() for found in self._renew_vm(readings.get(vm), vcpus, now)]

    def _renew_vm(
        self, reading: VmReading | None, vcpus: Mapping[int, TrackedVcpu], now: float
    ) -> Iterator[tuple[TrackedVcpu, Counts | None]]:
        positions = {} if reading is None else {vcpu.vcpu_id: place for place, vcpu in enumerate(reading.vcpus)}
        for vcpu_id, vcpu in vcpus.items():
            position = positions.get(vcpu_id)
            # A VM that cannot be read shows none of its vCPUs.
            if reading is None or (reading.vcpus and position is None):
                self._missing.setdefault(vcpu.key, now)
            else:
                self._missing.pop(vcpu.key, None)
            yield vcpu, None if reading is None else vcpu.renew(reading, position)

    def drop(self, key: VcpuKey) -> TrackedVcpu | None:
        """Track a vCPU no more; returns it if it was tracked."""
        vcpus = self._by_vm.get(key.vm, {})
        vcpu = vcpus.pop(key.vcpu_id, None)
        if not vcpus:
            self._by_vm.pop(key.vm, None)
        self.active.pop(key, None)
        self._missing.pop(key, None)
        return vcpu

    def drop_vm(self, vm: VmKey) -> list[TrackedVcpu]:
        """Track no vCPU of a VM any more; returns those that were tracked."""
        vcpus = list(self._by_vm.get(vm, {}).values())
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
