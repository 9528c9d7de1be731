"""Tries one feature on one VM, and prints ``works`` or why not: ``feature_probe.py PACKAGES FEATURE PID``.

Run as a user of no rights with chosen capabilities. It takes nothing but Python and the package kvm, in a directory
that everybody may read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from kvm.bpf.notify_trigger import NotifyTrigger
from kvm.counters.bpf import BpfSource
from kvm.counters.debugfs import DebugfsSource
from kvm.counters.source import CounterSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.processes import read_stat
from kvm.discovery.vm_discovery import Discovery, HeldVm
from kvm.errors import KvmReadError
from kvm.host.lockdown import read_lockdown
from kvm.identity.owners import read_owner
from kvm.model import EXITS, VmCounters, VmKey
from kvm.perf.notify_tracer import NotifyTracer
from kvm.read_errors import Subject

# The trigger's own is of kvm_intel alone; this one every KVM has, in the module kvm.
FUNCTION = "kvm_arch_vcpu_ioctl_run"
PROC, SYSFS, KVM_DEBUGFS = Path("/proc"), Path("/sys"), Path("/sys/kernel/debug/kvm")


def ignore(_whose: Subject, _kind: str, _message: str) -> None:
    """Other processes may be odd."""


def find_vms(pid: int) -> list[HeldVm]:
    return [vm for vm in Discovery(PROC, ignore).find_vms() if vm.key.pid == pid]


def read_by(source: CounterSource, pid: int, vms: list[HeldVm]) -> str:
    source.open()
    found: list[VmCounters] = [counters for key, counters in source.read(vms).items() if key.pid == pid]
    if not found:
        return "the VM is not found"
    return found[0].problem or ("works" if found[0].per_vcpu or found[0].totals else "no counters")


def try_bpf(pid: int) -> str:
    return read_by(BpfSource((EXITS,)), pid, [])


def try_stats_fd(pid: int) -> str:
    return read_by(StatsFdSource((EXITS,), ignore), pid, find_vms(pid))


def try_debugfs(pid: int) -> str:
    """Of a VM that is known: to find it takes the rights of another source."""
    numbers = [int(path.name.partition("-")[2]) for path in KVM_DEBUGFS.glob(f"{pid}-*")]
    vms = [HeldVm(VmKey(pid, read_stat(PROC, pid).start_ticks, number), pid, -1, None, {}) for number in numbers]
    return read_by(DebugfsSource((EXITS,), KVM_DEBUGFS, PROC, ignore), pid, vms)


def try_owners(pid: int) -> str:
    owner, problems = read_owner(PROC, pid, pid)
    return "works" if owner.project and not problems else f"no project is known; {problems}"


def try_trigger(_pid: int) -> str:
    status = NotifyTrigger(lambda _call: None, function=FUNCTION).open()
    return "works" if status.attached else status.reason


def try_rips(pid: int) -> str:
    tracer = NotifyTracer()
    tracer.open()
    tracer.arm(pid).disarm()
    return "works"


def try_lockdown(_pid: int) -> str:
    lockdown = read_lockdown(SYSFS)
    return "works" if lockdown.mode else lockdown.note


FEATURES: dict[str, Callable[[int], str]] = {
    "source bpf": try_bpf,
    "source stats_fd": try_stats_fd,
    "source debugfs": try_debugfs,
    "owners": try_owners,
    "trigger": try_trigger,
    "RIPs": try_rips,
    "lockdown": try_lockdown,
}

if __name__ == "__main__":
    try:
        print(FEATURES[sys.argv[2]](int(sys.argv[3])))
    except (KvmReadError, OSError) as err:
        print(f"refused: {err}")
