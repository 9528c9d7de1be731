"""Simulated snapshots of a host, for tests of what is made of them."""

from __future__ import annotations

from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    BlindSpot,
    Host,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vcpu,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)

INTEL = Host(
    kernel="6.12.48",
    cpu_vendor="GenuineIntel",
    cpu_family="6",
    cpu_model="143",
    cpu_stepping="8",
    cpu_model_name="Intel(R) Xeon(R) Platinum 8480+",
    microcode="0x2b000620",
    lockdown="integrity",
    kvm_module="kvm_intel",
    notify_supported=True,
    initial_pid_namespace=True,
)
UP = SourceReport("stats_fd", up=True)
HIDDEN = (BlindSpot("hidden_processes", "/proc hides process 1"),)
CLOSED = SourceReport("debugfs", up=False, reason="the kernel's lockdown forbids it")


def make_reading(name: str = "web", notify: tuple[int, ...] = (3, 0), pid: int = 4242) -> VmReading:
    vcpus = tuple(Vcpu(index, index * 2, 5000 + index) for index in range(len(notify)))
    return VmReading(
        vm=Vm(f"uuid-{pid}", VmKey(pid, 77, 9), Owner("qemu", name=name, uuid=f"uuid-{pid}", project="p1"), 1.7e9),
        source="stats_fd",
        vcpus=vcpus,
        vcpu_count=len(vcpus),
        counters=VmCounters(
            tuple(vcpu.vcpu_id for vcpu in vcpus),
            tuple(vcpu.tid for vcpu in vcpus),
            {NOTIFY_WINDOW_EXITS: notify, EXITS: tuple(1000 + value for value in notify)},
        ),
        protection=Protection.UNKNOWN,
    )


def make_unread(problem: str = "its VMM holds no stats fds", pid: int = 4343) -> VmReading:
    vm = Vm(f"firecracker-{pid}", VmKey(pid, 78, 9), Owner("firecracker"), None)
    return VmReading(vm, "", (), 2, VmCounters(problem=problem), Protection.UNKNOWN)


def make_snapshot(
    *readings: VmReading,
    host: Host = INTEL,
    sources: tuple[SourceReport, ...] = (UP, CLOSED),
    blind_spots: tuple[BlindSpot, ...] = (),
) -> Snapshot:
    return Snapshot(100.0, 1.7e9, host, readings, sources, {}, blind_spots)
