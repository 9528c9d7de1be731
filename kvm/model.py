"""The words of this program: what a host, a VM, a vCPU and a reading of them are.

Plain values without behaviour and without I/O. Everything that crosses from ``kvm/`` to ``exporter/`` is made of them.

Counters are held by column: a VM has one tuple of vCPUs and, for each statistic, one tuple of numbers in the same
order. A host with 10,000 vCPUs then costs some thousand objects a snapshot and not some ten thousand.

An absent number is absent: ``None``, or no key. It is never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvm.statistics import VmStatistics

NOTIFY_WINDOW_EXITS = "notify_window_exits"
EXITS = "exits"
IRQ_EXITS = "irq_exits"
# What a KVM with the project's patches (kvm/patches) says of a vCPU's notify exits.
RIP_STATISTICS = (
    "notify_window_same_rip_exits",
    "notify_window_stuck_exits",
    "notify_window_context_invalid_exits",
    "notify_window_last_rip",
    "notify_window_last_guest_mode",
    "notify_window_streak",
)


class VmKey(NamedTuple):
    """One VM of one process, for as long as the host is up.

    ``pid`` is the thread group id of the VMM as /proc shows it, ``start_ticks`` field 22 of /proc/PID/stat (so that a
    reused pid is another VM), ``vm_fd`` the lowest fd number at which the process holds the VM (-1 where it holds its
    vCPUs only): a process may have made several VMs.
    """

    pid: int
    start_ticks: int
    vm_fd: int


class Protection(StrEnum):
    """Whether a VM's notify exits are switched on (KVM_CAP_X86_NOTIFY_VMEXIT, include/uapi/linux/kvm.h)."""

    ARMED = "armed"
    OFF = "off"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Host:
    """What this host is and offers; "" and None stand for what could not be read.

    ``cpu_unknown_reason`` says why the CPU's fields are "". ``lockdown_note`` says how the mode was read where that is
    not by the mounted securityfs, or why it is not known. ``initial_pid_namespace`` is False where we run in a pid
    namespace of our own: a container without hostPID, whose /proc lacks the host's processes.
    """

    kernel: str
    cpu_vendor: str
    cpu_family: str
    cpu_model: str
    cpu_stepping: str
    cpu_model_name: str
    microcode: str
    lockdown: str
    kvm_module: str
    notify_supported: bool | None
    notify_unknown_reason: str = ""
    initial_pid_namespace: bool | None = None
    lockdown_note: str = ""
    cpu_unknown_reason: str = ""


class Identity(StrEnum):
    """Who vouches for a VM's name, UUID and owner, best first.

    ``libvirt``: a status file of the host's libvirt that nobody but root can write. ``cgroup``: a cgroup that root has
    made and named after the VM. ``container``: such a status file in a container, whose VM does not run as root.
    ``cmdline``: the command line, which whoever starts the VM chooses. ``claimed``: files that the VM's own user can
    write. ``process``: nothing tells, the VM is known by its program and pid.
    """

    LIBVIRT = "libvirt"
    CGROUP = "cgroup"
    CONTAINER = "container"
    CMDLINE = "cmdline"
    CLAIMED = "claimed"
    PROCESS = "process"

    @property
    def is_vouched(self) -> bool:
        """Whether it is more than a claim: no unprivileged user of the host can make it up."""
        return self in (Identity.LIBVIRT, Identity.CGROUP, Identity.CONTAINER)

    @property
    def is_unique(self) -> bool:
        """Whether whoever vouches knows all VMs of the host, and gives no identity twice."""
        return self in (Identity.LIBVIRT, Identity.CGROUP)


class CpuTopology(NamedTuple):
    """How many dies a socket has, cores a die, threads a core (QEMU's ``-smp``)."""

    dies: int
    cores: int
    threads: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose VM it is, as far as its VMM's command line and the host's files tell; "" where they do not.

    ``name`` is what the VMM or libvirt calls it, ``display_name`` what its user does, where that is another name
    (OpenStack's instance name). ``identity`` says who vouches for all of this, ``uid`` is the real uid of the VM's
    process (None where it cannot be read). ``cpu_topology`` is what QEMU was asked for, None where that is not known.
    """

    vmm: str
    name: str = ""
    uuid: str = ""
    own_id: str = ""
    project: str = ""
    namespace: str = ""
    display_name: str = ""
    identity: Identity = Identity.PROCESS
    uid: int | None = None
    cpu_topology: CpuTopology | None = None


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM with its identity within the host: ``id`` is the value of the label ``vm``."""

    id: str
    key: VmKey
    owner: Owner
    start_time_seconds: float | None


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU.

    ``index`` is the guest's CPU number, ``vcpu_id`` KVM's (an APIC id under QEMU and cloud-hypervisor), ``tid`` the
    host thread that runs it, None where that is not known.
    """

    index: int
    vcpu_id: int
    tid: int | None


@dataclass(frozen=True, slots=True)
class NotifyExit:
    """One traced notify exit: a record of the tracepoint kvm:kvm_exit with reason 75.

    ``time_ns`` is CLOCK_MONOTONIC, ``rip`` the guest's instruction pointer (None where the record does not tell it),
    ``qualification`` the exit qualification, ``idt_vectoring`` the IDT-vectoring information.
    """

    time_ns: int
    tid: int
    rip: int | None
    qualification: int
    idt_vectoring: int


class Instruction(NamedTuple):
    """The bytes at the RIP of ``streak`` notify exits, a nested guest's in ``guest_mode``; none where unreadable."""

    rip: int
    guest_mode: bool
    streak: int
    code: bytes


class VmCounters(NamedTuple):
    """What one source read of one VM.

    ``vcpu_ids`` are KVM's ids in ascending order; ``tids`` and each tuple of ``per_vcpu`` stand in the same order.
    ``totals`` are sums over every vCPU of the VM, from a source that has no numbers of single ones.
    ``notify_window_cycles`` and ``notify_flags`` are ``kvm->arch.notify_window`` and ``notify_vmexit_flags``, None
    where the source cannot see them. ``problem`` says why something is missing, "" where nothing is. ``statistics``
    is everything else that KVM counts, as far as it was asked for and could be read.
    """

    vcpu_ids: tuple[int, ...] = ()
    tids: tuple[int | None, ...] = ()
    per_vcpu: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    totals: Mapping[str, int] = MappingProxyType({})
    notify_window_cycles: int | None = None
    notify_flags: int | None = None
    problem: str = ""
    statistics: VmStatistics | None = None


@dataclass(slots=True)
class VmReading:
    """One VM in one snapshot: who it is, what was read of it, and by which source ("" where by none).

    ``vcpus`` is in the order of ``counters.vcpu_ids``, empty where only ``vcpu_count`` is known, and the same object
    while nothing changes. Treat a reading as frozen: it is not because that takes three times as long to make.
    """

    vm: Vm
    source: str
    vcpus: tuple[Vcpu, ...]
    vcpu_count: int | None
    counters: VmCounters
    protection: Protection

    @property
    def notify_exits(self) -> int | None:
        """The sum of the VM's notify exits; None unless every vCPU is in it."""
        column = self.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
        if column is not None and len(column) == len(self.vcpus) == self.vcpu_count:
            return sum(column)
        return self.counters.totals.get(NOTIFY_WINDOW_EXITS)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """How one source went: does it work, and if not, why and what a person can do about it."""

    source: str
    up: bool
    reason: str = ""
    remedy: str = ""


class BlindSpot(NamedTuple):
    """Why VMs of the host may have been overlooked: a word for a label, and a sentence with what to do about it."""

    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of the whole host.

    ``monotonic_seconds`` and ``unix_seconds`` are its time; ``readings`` are ordered by VM id; ``errors`` counts, since
    start, what was left out, by (source, kind). ``blind_spots`` say why there may be VMs that are not listed
    (kvm/blind_spots.py), ``vms_over_budget`` how many kvm/vm_budget.py has left out. ``kvm_changes`` is another number
    once KVM was loaded, removed or replaced, ``composition`` another object once anything but numbers may have changed.
    """

    monotonic_seconds: float
    unix_seconds: float
    host: Host
    readings: tuple[VmReading, ...]
    sources: tuple[SourceReport, ...]
    errors: Mapping[tuple[str, str], int]
    blind_spots: tuple[BlindSpot, ...] = ()
    vms_over_budget: int = 0
    kvm_changes: int = 0
    composition: object = field(default_factory=object, compare=False, repr=False)

    @property
    def complete(self) -> bool:
        """Whether every VM of the host was seen."""
        return not self.blind_spots

    @property
    def is_blind(self) -> bool:
        """Whether nothing was seen: no counter of any VM, and there are some, or may be."""
        return not any(reading.source for reading in self.readings) and bool(self.readings or self.blind_spots)


class SnapshotReader(Protocol):
    """Takes snapshots of a host, a real one or a simulated one."""

    def read(self) -> Snapshot:
        """Take a snapshot; what cannot be read is left out and reported, so this raises nothing."""
        ...

    def close(self) -> None:
        """Give back what the reader holds."""
        ...


class VcpuKey(NamedTuple):
    """One vCPU of one VM, by KVM's id."""

    vm: VmKey
    vcpu_id: int


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU in full.

    ``registers`` are the guest's general registers and ``rip`` as KVM has them in memory; those in ``stale`` KVM has
    not fetched since the guest last ran (on VMX rip and rsp, unless something asked for them): they prove nothing.
    ``statistics`` has every statistic that the kernel describes, histograms too. ``guest_mode`` says whether the vCPU
    ran a nested guest, ``state_protected`` that KVM cannot read its registers (guest_state_protected), ``vm_type`` is
    its VM's KVM_X86_*_VM; None where the kernel does not tell.
    """

    vcpu_id: int
    tid: int | None
    registers: Mapping[str, int]
    stale: frozenset[str]
    statistics: Mapping[str, tuple[int, ...]]
    state_protected: bool | None = None
    vm_type: int | None = None

    @property
    def guest_mode(self) -> bool | None:
        """Whether the vCPU ran a nested guest when it was read."""
        value = self.statistics.get("guest_mode")
        return None if value is None else bool(value[0])
