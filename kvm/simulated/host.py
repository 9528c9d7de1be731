"""A simulated host: for ``kvm-notify-exporter demo``, and for tests of everything downstream of a snapshot.

Its numbers are a function of the time since it was made, so that one clock always gives the same numbers:

- ``web-1`` takes a notify exit on its second vCPU every ``RARE_SECONDS``;
- ``batch-1`` gets stuck on its first vCPU for ``STUCK_SECONDS`` in every ``CYCLE_SECONDS``: notify exits come fast, and
  no other exits until it recovers;
- the others run in peace, with their protection armed, off or not known.

Every reading says ``simulated`` for its source: nobody shall take these for real.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kvm.abi import NotifyVmexitFlags
from kvm.identity.vm_ids import name_vm
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Host,
    Identity,
    Owner,
    Snapshot,
    SourceReport,
    Vcpu,
    VcpuState,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from kvm.protection import judge_protection
from kvm.simulated.statistics import plan, read_statistics
from kvm.statistics import StatSelection, StatTable

SOURCE: Final = "simulated"
RARE_SECONDS: Final = 20.0
CYCLE_SECONDS: Final = 180.0
STUCK_FROM_SECONDS: Final = 15.0
STUCK_SECONDS: Final = 60.0
STUCK_EXITS_PER_SECOND: Final = 40.0
EXITS_PER_SECOND: Final = 1500.0

_ENABLED = NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_ENABLED
_USER = NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_USER
_SECONDS_UP: Final = 86_400.0
_FIRST_PID: Final = 4_000
# The range of pids that one VM takes: itself and a thread for each vCPU.
_PIDS_PER_VM: Final = 1_000

_HOST: Final = Host(
    kernel="6.12.48-simulated",
    cpu_vendor="GenuineIntel",
    cpu_family="6",
    cpu_model="143",
    cpu_stepping="8",
    cpu_model_name="Simulated Xeon (Sapphire Rapids)",
    microcode="0x2b000643",
    lockdown="integrity",
    kvm_module="kvm_intel",
    notify_supported=True,
)


@dataclass(frozen=True, slots=True)
class _Role:
    """A kind of VM: whose it is, how many vCPUs it has, and how it behaves."""

    owner: Owner
    vcpus: int
    flags: int | None
    window_cycles: int | None = None
    notify_exits: Callable[[float], int] | None = None
    sum_only: bool = False


def count_rare_exits(seconds: float) -> int:
    """Return the notify exits after so many seconds of a vCPU that takes one every RARE_SECONDS."""
    return math.floor(seconds / RARE_SECONDS)


def count_stuck_exits(seconds: float) -> int:
    """Return the notify exits after so many seconds of a vCPU that is stuck now and then."""
    return math.floor(count_stuck_seconds(seconds) * STUCK_EXITS_PER_SECOND)


def count_stuck_seconds(seconds: float) -> float:
    """Return how many of the first ``seconds`` the vCPU that gets stuck has been stuck."""
    cycles, phase = divmod(seconds, CYCLE_SECONDS)
    return cycles * STUCK_SECONDS + min(max(phase - STUCK_FROM_SECONDS, 0.0), STUCK_SECONDS)


def is_stuck(seconds: float) -> bool:
    """Tell whether the vCPU that gets stuck is stuck after so many seconds."""
    return 0 <= seconds % CYCLE_SECONDS - STUCK_FROM_SECONDS < STUCK_SECONDS


@dataclass(frozen=True, slots=True)
class SimulatedVcpu:
    """A simulated vCPU, for simulated traces of it."""

    tid: int
    count: Callable[[float], int]
    gets_stuck: bool

    @property
    def interval_seconds(self) -> float:
        """How long it takes from one notify exit to the next."""
        return 1 / STUCK_EXITS_PER_SECOND if self.gets_stuck else RARE_SECONDS

    def newest_exit_age_seconds(self, seconds: float) -> float:
        """Return how long ago its newest notify exit was after so many seconds, of those in which it takes them."""
        taking_seconds = count_stuck_seconds(seconds) if self.gets_stuck else seconds
        return taking_seconds / self.interval_seconds % 1 * self.interval_seconds

    def is_stuck(self, seconds: float) -> bool:
        """Tell whether it is stuck after so many seconds."""
        return self.gets_stuck and is_stuck(seconds)


def _libvirt(name: str, project: str) -> Owner:
    return Owner(vmm="qemu", name=name, project=project, identity=Identity.LIBVIRT, uid=64055)


_CAST: Final = (
    _Role(_libvirt("web", "shop"), 2, _ENABLED | _USER, 0, count_rare_exits),
    _Role(_libvirt("batch", "research"), 4, _ENABLED | _USER, 128_000, count_stuck_exits),
    # As in KubeVirt's virt-launcher, where libvirt and QEMU run as one user.
    _Role(Owner("qemu", name="ci_runner", namespace="ci", identity=Identity.CLAIMED, uid=107), 2, _ENABLED | _USER, 0),
    _Role(Owner(vmm="firecracker", own_id="function", identity=Identity.CGROUP, uid=1000), 1, 0),
    _Role(Owner(vmm="cloud-hypervisor", name="gateway", identity=Identity.CMDLINE, uid=0), 2, 0),
    _Role(Owner(vmm="homemade-vmm", uid=1001), 2, None, sum_only=True),
)


class SimulatedHost:
    """A SnapshotReader of ``vm_count`` simulated VMs; ``vcpus_per_vm`` overrides how many vCPUs each has.

    ``monotonic_clock`` and ``unix_clock`` give seconds, as time.monotonic and time.time do. ``selection`` is what it
    has of KVM's statistics besides the counters.
    """

    def __init__(
        self,
        monotonic_clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        *,
        vm_count: int = len(_CAST),
        vcpus_per_vm: int | None = None,
        selection: StatSelection | None = None,
    ) -> None:
        self._table = plan(selection) if selection else None
        self._monotonic_clock = monotonic_clock
        self._unix_clock = unix_clock
        self._made_seconds = monotonic_clock()
        made_unix_seconds = unix_clock()
        members = [
            _make_member(number, made_unix_seconds, vcpus_per_vm or _CAST[number % len(_CAST)].vcpus)
            for number in range(vm_count)
        ]
        self._members = sorted(members, key=lambda member: member[1].id)

    def read(self) -> Snapshot:
        """Take one snapshot."""
        now = self._monotonic_clock()
        seconds = max(0.0, now - self._made_seconds)
        return Snapshot(
            monotonic_seconds=now,
            unix_seconds=self._unix_clock(),
            host=_HOST,
            readings=tuple(_read_member(role, vm, vcpus, seconds, self._table) for role, vm, vcpus in self._members),
            sources=(SourceReport(SOURCE, up=True, reason="simulated numbers, not this host's"),),
            errors={},
        )

    def find_time(self, age_seconds: float) -> float:
        """Return what this host's clock showed at an age of it."""
        return self._made_seconds + age_seconds

    def age_seconds(self) -> float:
        """Return for how long this host has been there: what its numbers are a function of."""
        return max(0.0, self._monotonic_clock() - self._made_seconds)

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None:
        """Read one vCPU in full; None where there is no such."""
        for role, vm, vcpus in self._members:
            if vm.key == key and vcpu_id < len(vcpus) and not role.sum_only:
                seconds = self.age_seconds()
                notify, exits = _count_exits(role, key.pid, len(vcpus), seconds)
                # Registers are those at some moment of its work: the same as long as it does none.
                work = exits[vcpu_id] - notify[vcpu_id]
                statistics = {NOTIFY_WINDOW_EXITS: (notify[vcpu_id],), EXITS: (exits[vcpu_id],), "guest_mode": (0,)}
                registers = {"rax": work, "rcx": work // 7, "rip": 0, "rsp": 0}
                return VcpuState(
                    vcpu_id, vcpus[vcpu_id].tid, registers, frozenset({"rip", "rsp"}), statistics, False, 0
                )
        return None

    def read_cpu_time(self, pid: int, tid: int) -> float | None:
        """Return how many seconds a vCPU thread has run: all the time while it is stuck, half of it otherwise."""
        vcpu = self.find_thread(tid)
        if vcpu is None or pid <= 0:
            return None
        seconds = self.age_seconds()
        stuck = count_stuck_seconds(seconds) if vcpu.gets_stuck else 0.0
        return stuck + (seconds - stuck) / 2

    def find_thread(self, tid: int) -> SimulatedVcpu | None:
        """Find a simulated vCPU thread, None where there is no such."""
        for role, _, vcpus in self._members:
            for position, vcpu in enumerate(vcpus):
                if vcpu.tid == tid:
                    takes_exits = role.notify_exits is not None and position == _find_position(role, len(vcpus))
                    count = role.notify_exits if takes_exits and role.notify_exits else _count_none
                    return SimulatedVcpu(tid, count, count is count_stuck_exits)
        return None

    def close(self) -> None:
        """Do nothing: a simulated host holds nothing."""


def _make_member(number: int, made_unix_seconds: float, vcpu_count: int) -> tuple[_Role, Vm, tuple[Vcpu, ...]]:
    role = _CAST[number % len(_CAST)]
    pid = _FIRST_PID + _PIDS_PER_VM * number
    owner, nth = role.owner, number // len(_CAST) + 1
    if owner.name:
        owner = replace(owner, name=f"{owner.name}-{nth}", uuid=f"5107a7ed-0000-4000-8000-{number + 1:012x}")
    if owner.own_id:
        owner = replace(owner, own_id=f"{owner.own_id}-{nth}")
    key = VmKey(pid, 1_000 * (number + 1), 12)
    vm = Vm(
        id=name_vm(owner, key),
        key=key,
        owner=owner,
        start_time_seconds=made_unix_seconds - _SECONDS_UP + 60.0 * number,
    )
    vcpus = tuple(Vcpu(index=index, vcpu_id=index, tid=pid + 10 + index) for index in range(vcpu_count))
    return role, vm, vcpus


def _read_member(role: _Role, vm: Vm, vcpus: tuple[Vcpu, ...], seconds: float, table: StatTable | None) -> VmReading:
    notify, exits = _count_exits(role, vm.key.pid, len(vcpus), seconds)
    statistics = read_statistics(table, _SECONDS_UP + seconds, exits, sum_only=role.sum_only) if table else None
    if role.sum_only:
        counters = VmCounters(
            totals={NOTIFY_WINDOW_EXITS: sum(notify), EXITS: sum(exits)},
            problem="only sums over the VM are known",
            statistics=statistics,
        )
    else:
        counters = VmCounters(
            vcpu_ids=tuple(vcpu.vcpu_id for vcpu in vcpus),
            tids=tuple(vcpu.tid for vcpu in vcpus),
            per_vcpu={NOTIFY_WINDOW_EXITS: notify, EXITS: exits},
            notify_window_cycles=role.window_cycles,
            notify_flags=role.flags,
            statistics=statistics,
        )
    return VmReading(
        vm=vm,
        source=SOURCE,
        vcpus=() if role.sum_only else vcpus,
        vcpu_count=len(vcpus),
        counters=counters,
        protection=judge_protection(_HOST.notify_supported, role.flags),
    )


def _count_none(seconds: float) -> int:
    return 0 * round(seconds)


def _find_position(role: _Role, vcpu_count: int) -> int:
    """Find which vCPU of a VM takes notify exits, if one does."""
    return 0 if role.notify_exits is count_stuck_exits else min(1, vcpu_count - 1)


def _count_exits(role: _Role, seed: int, vcpu_count: int, seconds: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the notify exits and all exits of each vCPU; a stuck vCPU has no others while it is stuck."""
    notify = [0] * vcpu_count
    exits = [
        math.floor((_SECONDS_UP + seconds) * EXITS_PER_SECOND) // (1 + (seed + 7 * index) % 5)
        for index in range(vcpu_count)
    ]
    if role.notify_exits is not None and vcpu_count:
        stuck = role.notify_exits is count_stuck_exits
        position = _find_position(role, vcpu_count)
        running_seconds = _SECONDS_UP + seconds - (count_stuck_seconds(seconds) if stuck else 0.0)
        notify[position] = role.notify_exits(seconds)
        exits[position] = math.floor(running_seconds * EXITS_PER_SECOND) + notify[position]
    return tuple(notify), tuple(exits)
