"""Simulated hosts and VMs as a Prometheus would have seen them over a day: the series that their agents export."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.prometheus import metrics as m
from grafana.builder.queries import UP
from kvm.model import Protection
from tests.live.history_writer import ByHour, Series, always

INTERVAL_SECONDS = 0.000109
WINDOW_CYCLES = "0"
TRACED_PER_SECOND = 20.0
COLLECTORS = ("vcpu", "vm", "host", "exporter")


@dataclass(frozen=True)
class Spell:
    """Notify exits of a vCPU from one hour to another, at a rate; without progress where it is ``stalled``."""

    start: float
    end: float
    per_second: float
    stalled: bool = False

    def count(self, hour: float, most_per_second: float = float("inf")) -> float:
        """Return how many exits there were by that hour, of at most so many a second."""
        return max(0.0, min(hour, self.end) - self.start) * 3600 * min(self.per_second, most_per_second)

    def is_at(self, hour: float) -> bool:
        return self.start <= hour < self.end


@dataclass(frozen=True)
class Vm:
    """A VM: who it is, and what its vCPUs go through."""

    vm: str
    vmm: str
    vcpus: int
    started: float
    names: Mapping[str, str]
    protection: Protection = Protection.ARMED
    spells: Mapping[int, Sequence[Spell]] = field(default_factory=dict)

    def list_spells(self) -> list[Spell]:
        return [spell for spells in self.spells.values() for spell in spells]


@dataclass(frozen=True)
class Host:
    """A host. ``microcodes`` are each with the hours from and until when; from ``gone`` on its agent is dead."""

    instance: str
    cpu: Mapping[str, str]
    microcodes: Sequence[tuple[str, float, float]]
    vms: Sequence[Vm]
    supported: bool = True
    traceable: bool = True
    blind_spot: str = ""
    gone: float = 1.0
    lockdown: str = "none"
    every_vcpu: bool = False
    version: str = "1.0.0"

    def list_spells(self) -> list[Spell]:
        return [spell for vm in self.vms for spell in vm.list_spells()]


def _count(spells: Sequence[Spell], most_per_second: float = float("inf")) -> ByHour:
    return lambda hour: float(sum(int(spell.count(hour, most_per_second)) for spell in spells))


def _count_stalled(spells: Sequence[Spell]) -> ByHour:
    return lambda hour: float(sum(spell.stalled and spell.is_at(hour) for spell in spells))


def _since(hour_of_birth: float, value: ByHour) -> ByHour:
    return lambda hour: value(hour) if hour >= hour_of_birth else None


def make_uuid(chance: random.Random) -> str:
    """Return a random UUID."""
    bits = [chance.getrandbits(size) for size in (32, 16, 12, 12, 48)]
    return "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}".format(*bits)


def make_series(host: Host, end: float) -> Iterator[Series]:
    """Yield the series of a host's agent, until it is dead, and whether it was scraped."""
    yield Series(UP, host.instance, lambda hour: float(hour < host.gone), {})
    alive = (_make_host_series(host), _make_agent_series(host, end), _make_vm_series(host, end))
    for series in (one for some in alive for one in some):
        value = series.value
        yield Series(
            series.metric,
            series.instance,
            lambda hour, value=value: value(hour) if hour < host.gone else None,  # type: ignore[misc]
            series.labels,
        )


def _make_host_series(host: Host) -> Iterator[Series]:
    spells = host.list_spells()
    for microcode, since, until in host.microcodes:
        info = {**host.cpu, "microcode": microcode, "lockdown": host.lockdown}
        yield Series(
            m.HOST_INFO,
            host.instance,
            lambda hour, since=since, until=until: 1.0 if since <= hour < until else None,  # type: ignore[misc]
            info,
        )
    yield Series(m.HOST_NOTIFY_SUPPORTED, host.instance, always(host.supported), {})
    yield Series(m.HOST_NOTIFY_WINDOW_EXITS, host.instance, _count(spells), {})
    yield Series(m.HOST_VMS_OVER_BUDGET, host.instance, always(0), {})
    if not host.blind_spot:
        for state in Protection:
            vcpus = [vm.vcpus for vm in host.vms if vm.protection is state]
            yield Series(m.HOST_VMS, host.instance, always(len(vcpus)), {"protection": state})
            yield Series(m.HOST_VCPUS, host.instance, always(sum(vcpus)), {"protection": state})
    if host.traceable:
        yield Series(m.HOST_NO_PROGRESS, host.instance, _count_stalled(spells), {})
    if stalls := [spell.start for spell in spells if spell.stalled]:
        seen = _since(min(stalls), always(INTERVAL_SECONDS))
        yield Series(m.HOST_INTERVAL_MIN, host.instance, seen, {"window_cycles": WINDOW_CYCLES})


def _make_agent_series(host: Host, end: float) -> Iterator[Series]:
    spells, name = host.list_spells(), host.instance
    build = {"version": host.version, "revision": "ed62a74", "python_version": "3.11.2"}
    yield Series(m.BUILD_INFO, name, always(1), build)
    yield Series(m.COMPLETE, name, always(not host.blind_spot), {})
    if host.blind_spot:
        yield Series(m.INCOMPLETE_REASON, name, always(1), {"reason": host.blind_spot})
    yield Series(m.SNAPSHOT_TIMESTAMP, name, lambda hour: end + hour * 3600, {})
    yield Series(m.POLL_PERIOD, name, always(0 if host.traceable else 10), {})
    for source, works in (("bpf", True), ("stats_fd", True), ("debugfs", host.lockdown == "none")):
        yield Series(m.SOURCE_UP, name, always(works), {"source": source})
    yield Series(m.TRACED_VCPUS, name, _count_stalled(spells), {})
    yield Series(m.TRACE_ARMINGS, name, _count(spells, 0.1), {})
    yield Series(m.TRACE_RECORDS, name, _count(spells, TRACED_PER_SECOND), {})
    warned = [spell for spell in spells if spell.stalled]
    yield Series(m.WARNINGS, name, lambda hour: sum((hour >= s.start) + (hour >= s.end) for s in warned), {})
    for metric in (m.TRACE_LOST_RECORDS, m.TRACE_BUDGET_EXHAUSTED, m.WARNINGS_SUPPRESSED):
        yield Series(metric, name, always(0), {})
    for collector in COLLECTORS:
        yield Series(m.SCRAPE_DURATION, name, always(0.002), {"collector": collector})
        yield Series(m.SCRAPE_SUCCESS, name, always(1), {"collector": collector})


def _make_vm_series(host: Host, end: float) -> Iterator[Series]:
    for number, vm in enumerate(host.vms):
        key = {"vm": vm.vm}
        info = {**dict.fromkeys(m.VM_INFO.labels, ""), **key, **vm.names, "vmm": vm.vmm}
        info |= {
            "pid": str(4000 + 17 * number),
            "uid": "64055",
            "identity": "libvirt" if vm.vmm == "qemu" else "process",
        }
        yield Series(m.VM_INFO, host.instance, always(1), info)
        for state in Protection:
            yield Series(m.VM_NOTIFY_PROTECTION, host.instance, always(state is vm.protection), {**key, "state": state})
        yield Series(m.VM_SOURCE_INFO, host.instance, always(1), {**key, "source": "bpf"})
        yield Series(m.VM_VCPUS, host.instance, always(vm.vcpus), key)
        yield Series(m.VM_START_TIME, host.instance, always(end + vm.started * 3600), key)
        if vm.protection is Protection.ARMED:
            yield Series(m.VM_NOTIFY_WINDOW, host.instance, always(float(WINDOW_CYCLES)), key)
        yield Series(m.VM_NOTIFY_WINDOW_EXITS, host.instance, _count(vm.list_spells()), key)
        for vcpu in range(vm.vcpus):
            if host.every_vcpu or vcpu in vm.spells:
                yield from _make_vcpu_series(host, vm, vcpu, end)


def _make_vcpu_series(host: Host, vm: Vm, vcpu: int, end: float) -> Iterator[Series]:
    spells, labels = vm.spells.get(vcpu, ()), {"vm": vm.vm, "vcpu": str(vcpu)}
    busy = 900.0 + 400.0 * (vcpu % 3)
    notify = _count(spells)

    def count_all(hour: float) -> float:
        """Exits of all kinds: while it is stalled, hardly any but notify exits."""
        lost = sum(spell.count(hour) / spell.per_second for spell in spells if spell.stalled)
        return int(((hour - vm.started) * 3600 - lost) * busy) + (notify(hour) or 0.0)

    yield Series(m.VCPU_NOTIFY_WINDOW_EXITS, host.instance, notify, labels)
    yield Series(m.VCPU_EXITS, host.instance, count_all, labels)
    if not spells:
        return
    birth = min(spell.start for spell in spells)
    same_rip = [spell for spell in spells if spell.stalled]
    for metric, value in (
        (m.VCPU_TRACED_EXITS, _count(spells, TRACED_PER_SECOND)),
        (m.VCPU_SAME_RIP_EXITS, _count(same_rip, TRACED_PER_SECOND)),
        (m.VCPU_CONTEXT_INVALID, always(0)),
        (m.VCPU_LAST_NOTIFY_EXIT, lambda hour: end + 3600 * max(min(hour, s.end) for s in spells if s.start <= hour)),
    ):
        yield Series(metric, host.instance, _since(birth, value), labels)
    if host.traceable:
        yield Series(m.VCPU_NO_PROGRESS, host.instance, _since(birth, _count_stalled(spells)), labels)
        yield Series(m.VCPU_STALL_START, host.instance, _tell_start(same_rip, end), labels)


def _tell_start(stalls: Sequence[Spell], end: float) -> ByHour:
    return lambda hour: next((end + spell.start * 3600 for spell in stalls if spell.is_at(hour)), None)
