"""Tells whether BPF reads KVM's memory right: what a vCPU of our own has to read like, and where it does not.

The kernel's types say where KVM's structs have their fields, and they may be wrong: an out-of-tree kvm module without
types of its own, built with 24 bytes more in one struct, reads as VMs that take no exits. Nothing in what is read tells
that. So a vCPU of our own is given numbers that are unlikely to be found by chance, and is run, without entering a
guest, RUNS times: some statistic of KVM has counted that, which its stats fd tells, and BPF has to find the same
number in the same statistic.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvm.bpf.vcpu_decode import REGISTERS
from kvm.errors import MalformedData, SourceUnavailable
from kvm.host import throwaway_vm
from kvm.host.throwaway_vm import ThrowawayVm
from kvm.model import VcpuState, VmCounters
from kvm.statistics import VmStatistics, cut_values

RUNS = 101
REMEDY = "load the kvm module that belongs to this kernel, or build yours with CONFIG_DEBUG_INFO_BTF_MODULES"
# struct kvm_regs has them in another order than KVM's own array.
_ORDER = (*("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"), *(f"r{n}" for n in range(8, 16)), "rip")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What our own vCPU has to read like; ``counter`` is a statistic that has counted its runs."""

    counter: str
    vcpu_id: int
    tid: int
    notify: tuple[int, int]
    statistics: Mapping[str, tuple[int, ...]]
    vm_statistics: Mapping[str, tuple[int, ...]]
    registers: Mapping[str, int]

    def find_differences(self, counters: VmCounters | None) -> Iterator[str]:
        """Yield what a snapshot reads otherwise, of the VM's statistics ``counter`` alone."""
        if counters is None or len(counters.vcpu_ids) != 1:
            yield "it is not found among the vCPUs of its VM"
            return
        yield from _compare("its number", counters.vcpu_ids[0], self.vcpu_id)
        yield from _compare("its thread", counters.tids[0], self.tid)
        yield from _compare(self.counter, counters.per_vcpu[self.counter], self.statistics[self.counter])
        notify = (counters.notify_window_cycles, counters.notify_flags)
        if notify != (None, None):  # KVM is older than they are
            yield from _compare("notify window and flags", notify, self.notify)

    def find_statistic_differences(self, statistics: VmStatistics | None) -> Iterator[str]:
        """Yield which of the VM's statistics, and of its only vCPU's, are read otherwise."""
        if statistics is None:
            yield "its statistics are not read"
            return
        of_vcpu = statistics.vcpu_sums or tuple(column[0] for column in statistics.vcpu_columns or ())
        for descriptor, values in cut_values(statistics.table.vm, statistics.vm or ()):
            yield from _compare(descriptor.key, values, self.vm_statistics[descriptor.name])
        for descriptor, values in cut_values(statistics.table.vcpu, of_vcpu):
            yield from _compare(descriptor.key, values, self.statistics[descriptor.name])

    def find_state_differences(self, state: VcpuState | None) -> Iterator[str]:
        """Yield what a read of the vCPU in full reads otherwise."""
        if state is None:
            yield "it is not found by its number"
            return
        yield from _compare("its thread", state.tid, self.tid)
        for name, values in state.statistics.items():
            yield from _compare(name, values, self.statistics[name])
        for name, value in state.registers.items():
            yield from _compare(name, value, self.registers[name])
        yield from _compare("stale registers", sorted(state.stale), [])
        yield from _compare("guest_state_protected", bool(state.state_protected), False)
        yield from _compare("vm_type", state.vm_type or 0, 0)


def _compare(what: str, read: object, expected: object) -> Iterator[str]:
    if read != expected:
        yield f"{what} reads {read} and is {expected}"


def take_fingerprint(vm: ThrowawayVm) -> Fingerprint:
    """Run the VM's vCPU in this thread, and say what it has to read like; raises SourceUnavailable."""
    try:
        before = vm.read_statistics()
        vm.write_registers()
        vm.run(RUNS)
        statistics, vm_statistics = vm.read_statistics(), vm.read_vm_statistics()
    except (OSError, MalformedData) as err:
        raise SourceUnavailable(f"nothing shows whether KVM's memory is read right: {err}") from err
    counting = [name for name in before if statistics[name] == (RUNS,) and before[name] == (0,)]
    if not counting:
        reason = "nothing shows whether KVM's memory is read right: no statistic counts the runs of a vCPU of our own"
        raise SourceUnavailable(reason, "please report this with the kernel's version")
    registers = dict(zip(_ORDER, throwaway_vm.REGISTERS, strict=True))
    return Fingerprint(
        counter=counting[0],
        vcpu_id=throwaway_vm.VCPU_ID,
        tid=threading.get_native_id(),
        notify=vm.notify,
        statistics=statistics,
        vm_statistics=vm_statistics,
        registers={name: registers[name] for name in REGISTERS},
    )


def refuse_own_vcpu(differences: Sequence[str]) -> SourceUnavailable:
    """Say that a vCPU of our own is not read as what it is."""
    shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
    return refuse_layout(f"of a vCPU of our own, {shown}")


def refuse_layout(evidence: str) -> SourceUnavailable:
    """Say that KVM's structs are others than the kernel's types describe."""
    return SourceUnavailable(f"KVM's memory is laid out otherwise than the kernel's types say: {evidence}", REMEDY)
