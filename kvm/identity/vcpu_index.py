"""Numbers vCPUs as the guest does: by the VMM's own index, whatever source they were read from.

KVM's vcpu_id is an APIC id under QEMU and cloud-hypervisor, and has holes where cores or threads are not powers of two
(kvm_arch_vcpu_id in QEMU's target/i386/kvm/kvm.c). The VMM's own index stands in the name of the vCPU's thread, or
under libvirt in the name of its cgroup. Thread names belong to strangers: an index counts only if every vCPU of the VM
has one and no two are alike. Else QEMU's index follows from the APIC id and the topology of ``-smp``, and where that is
not known either, vcpu_id itself is the number: a label must not pass to another vCPU when one is plugged.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvm.model import CpuTopology, Vcpu

# QEMU: accel/kvm/kvm-accel-ops.c; Firecracker: src/vmm/src/vstate/vcpu.rs; cloud-hypervisor: vmm/src/cpu.rs;
# crosvm: src/crosvm/sys/linux/vcpu.rs. comm is cut to 15 bytes: `crosvm_vcpu1000` still fits.
_THREAD_NAME = re.compile(r"CPU (\d{1,5})/KVM|fc_vcpu (\d{1,5})|(?:crosvm_)?vcpu(\d{1,5})")
# libvirt: docs/cgroups.rst, `.../vcpuN` for the threads of each vCPU
_CGROUP = re.compile(r"/vcpu(\d{1,5})$", re.MULTILINE)


def parse_thread_name(comm: str) -> int | None:
    """Return the index in a vCPU thread's name, None where it is no such name."""
    match = _THREAD_NAME.fullmatch(comm.removesuffix("\n"))
    return int(next(group for group in match.groups() if group is not None)) if match else None


def parse_cgroup(text: str) -> int | None:
    """Return libvirt's vCPU number from a thread's /proc/TID/cgroup, None where there is none."""
    match = _CGROUP.search(text)
    return int(match[1]) if match else None


def read_index(proc: Path, pid: int, tid: int) -> int | None:
    """Read the index that the VMM gave to the vCPU of this thread; None where nothing tells."""
    directory = proc / str(pid) / "task" / str(tid)
    with contextlib.suppress(OSError):  # a thread that has just ended has no name: the rank serves
        index = parse_thread_name((directory / "comm").read_text(errors="replace"))
        return index if index is not None else parse_cgroup((directory / "cgroup").read_text(errors="replace"))
    return None


def find_cpu_index(apic_id: int, topology: CpuTopology) -> int | None:
    """Return QEMU's cpu_index for an APIC id, None where the topology has no such CPU.

    Each level has as many bits as its largest number needs (include/hw/i386/topology.h).
    """
    index, above = 0, apic_id
    size = 1
    for count in (topology.threads, topology.cores, topology.dies):
        width = (count - 1).bit_length()
        number = above & ((1 << width) - 1)
        if number >= count:
            return None
        index += number * size
        size *= count
        above >>= width
    return index + above * size


def number_vcpus(
    vcpu_ids: Sequence[int],
    tids: Sequence[int | None],
    indexes: Mapping[int, int | None],
    topology: CpuTopology | None = None,
) -> tuple[Vcpu, ...]:
    """Number a VM's vCPUs, given in ascending order of vcpu_id; ``indexes`` maps host threads to VMMs' indexes."""
    found = [indexes.get(tid) if tid is not None else None for tid in tids]
    if None in found or len(set(found)) != len(vcpu_ids):
        found = [find_cpu_index(vcpu_id, topology) for vcpu_id in vcpu_ids] if topology else list(vcpu_ids)
    if None in found:
        found = list(vcpu_ids)
    return tuple(
        Vcpu(index, vcpu_id, tid)
        for index, vcpu_id, tid in zip(found, vcpu_ids, tids, strict=True)
        if index is not None
    )
