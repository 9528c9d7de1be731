"""Understands what the BPF programs read: blocks of bytes in, ``VmCounters`` out; no I/O.

A host with 10,000 vCPUs is read each second, so nothing is made anew that did not change: each VM's key, vcpu_ids and
tids are kept, as the same objects, until the bytes they came from differ. That leaves cutting columns of numbers.

The address of its struct kvm tells one VM of the host from another while it lives. It stays inside: addresses of the
kernel are nobody's business, and outside a VM is called by its ``VmKey``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

from kvm import abi
from kvm.binary_stats import Statistic, decode_values
from kvm.bpf.statistic_rows import StatisticCutter, VmPlace
from kvm.errors import MalformedData
from kvm.model import VcpuState, VmCounters, VmKey
from kvm.statistics import StatTable, VmStatistics

# struct vm of vcpus.bpf.c: kvm, mm, start_boottime, tgid, vm_fd, first, count, notify_window, notify_vmexit_flags,
# next, has_notify, missing
VM_RECORD = struct.Struct("=3QIi7I4x")
# struct vcpu_identity: vcpu_id, tid (0: never run)
IDENTITY = struct.Struct("=Ii")
# struct file_record, without its values: kvm, start_boottime, tgid, fd, is_vcpu, is_owner, notify_window,
# notify_vmexit_flags, has_notify, vcpu_id, tid, online_vcpus
FILE_RECORD = struct.Struct("=2Q8IiI")
# struct vcpu_state without its statistics: regs, rip, regs_avail, vcpu_id, tid, guest_state_protected, vm_type
STATE_RECORD = struct.Struct("=18QIi2I")
_NOT_KNOWN = 0xFFFFFFFF

# Process and thread ids and fds are ints in the kernel.
_INT_MAX = 0x7FFFFFFF

_NO_TOTALS: Mapping[str, int] = MappingProxyType({})

NS_PER_TICK = 1_000_000_000 // abi.USER_HZ
# enum kvm_reg (arch/x86/include/asm/kvm_host.h); bit N of regs_avail says that register N is not stale
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)), "rip")


class HostBlocks(NamedTuple):
    """One read of the host: VM_RECORDs, IDENTITY records, and a column of values for each statistic.

    Of the statistics besides there is a row of 64-bit numbers for each VM, in the order of ``vms``, and a column for
    each value of a vCPU; both are shorter where only the first VMs were read so.
    """

    vms: bytes
    identities: bytes
    columns: tuple[tuple[int, ...], ...]
    vm_rows: bytes = b""
    stat_columns: tuple[tuple[int, ...], ...] = ()


class _Facts(NamedTuple):
    """What a VM's record says of it, besides whose it is and where its numbers stand."""

    window_cycles: int | None
    notify_flags: int | None
    missing: int


class _KeptVm:
    """A VM for as long as nothing of it changes but its numbers; its vCPUs are in ascending order of their ids."""

    __slots__ = ("facts", "identities", "key", "order", "owner", "problem", "tids", "vcpu_ids")

    def __init__(self, owner: tuple[int, int], key: VmKey, identities: bytes, facts: _Facts) -> None:
        self.owner = owner
        self.key = key
        self.identities = identities
        self.facts = facts
        self.problem = f"{facts.missing} of its vCPUs have no open file" if facts.missing else ""
        pairs = list(IDENTITY.iter_unpack(identities))
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        self.vcpu_ids = tuple(pairs[i][0] for i in order)
        self.tids = tuple(pairs[i][1] or None for i in order)
        # vCPUs stand in the order in which they were made; their ids nearly always ascend too
        self.order = None if order == list(range(len(pairs))) else itemgetter(*order)

    def count(
        self, names: Sequence[str], columns: Sequence[tuple[int, ...]], statistics: VmStatistics | None
    ) -> VmCounters:
        """Make counters of a column of numbers for each name."""
        window, flags, _ = self.facts
        per_vcpu = dict(zip(names, columns, strict=False))  # strict=True takes longer, and the rows are all alike
        return VmCounters(self.vcpu_ids, self.tids, per_vcpu, _NO_TOTALS, window, flags, self.problem, statistics)


class VmAssembler:
    """Makes counters of blocks. ``names`` are those of the columns, ``table`` describes the statistics besides.

    What has not moved is the same object as in the snapshot before: a VM's column, and where nothing of a VM has moved
    its ``VmCounters``. So whoever comes after need not look at numbers to know that they are old.
    """

    def __init__(self, names: Iterable[str], table: StatTable | None = None) -> None:
        self._names = tuple(names)
        self._cutter = StatisticCutter(table) if table else None
        self._described_by: tuple[bytes, bytes] | None = None
        self._kept: dict[int, _KeptVm] = {}
        # By VM, in the same order: where its numbers stand among those of all vCPUs, and how to sort them.
        self._cuts: dict[int, tuple[slice, Callable[[tuple[int, ...]], tuple[int, ...]] | None]] = {}
        # By statistic and then by VM; None before the first snapshot of a VM.
        self._columns: list[list[tuple[int, ...] | None]] = []
        # By statistic: what all of these were cut from. Nothing where VMs have been described since.
        self._cut_from: dict[int, tuple[int, ...]] = {}
        self._counters: dict[VmKey, VmCounters] = {}
        # By VM, in the same order.
        self._statistics: list[VmStatistics | None] = []

    def find_kvm(self, key: VmKey) -> int | None:
        """Return the address of a VM of the newest snapshot, None if there was no such."""
        return next((kvm for kvm, kept in self._kept.items() if kept.key == key), None)

    def find_key(self, kvm: int) -> VmKey | None:
        """Return the key of the VM at this address in the newest snapshot, None if there was no such."""
        return self._kept[kvm].key if kvm in self._kept else None

    def assemble(self, blocks: HostBlocks) -> dict[VmKey, VmCounters]:
        """Make counters of one snapshot's blocks; VMs without an owner are left out.

        Raises MalformedData where a VM's record makes no sense.
        """
        # VMs come and go seldom: to compare what describes 10,000 vCPUs takes 5 us, to understand it 0.9 ms.
        described_by = (blocks.vms, blocks.identities)
        if described_by != self._described_by:
            self._describe(blocks)
            self._described_by, self._cut_from = described_by, {}
        is_as_before = bool(self._cut_from)
        columns = [
            # To see that no vCPU's number has moved takes a fifth of cutting it into VMs.
            before if column == self._cut_from.get(number) else self._cut(column, before)
            for number, (before, column) in enumerate(zip(self._columns, blocks.columns, strict=True))
        ]
        self._cut_from = dict(enumerate(blocks.columns))
        cutter = self._cutter
        statistics = cutter.cut(blocks.vm_rows, blocks.stat_columns) if cutter else self._statistics
        if is_as_before and columns == self._columns and statistics == self._statistics:
            return self._counters
        rows = zip(
            self._kept.values(),
            zip(*self._columns, strict=True),
            zip(*columns, strict=True),
            self._statistics,
            statistics,
            strict=True,
        )
        self._counters = {
            vm.key: self._counters[vm.key]
            if now == before and of_rest is rest_before
            else vm.count(self._names, now, of_rest)
            for vm, before, now, rest_before, of_rest in rows
        }
        self._columns, self._statistics = columns, statistics
        return self._counters

    def _cut(self, column: tuple[int, ...], before: Sequence[tuple[int, ...] | None]) -> list[tuple[int, ...] | None]:
        """Cut a column of all vCPUs into those of the VMs."""
        cut = [column[place] if sort is None else sort(column[place]) for place, sort in self._cuts.values()]
        return [old if old == new else new for old, new in zip(before, cut, strict=True)]

    def _describe(self, blocks: HostBlocks) -> None:
        """Find out which VMs there are, and where the numbers of each stand."""
        kept_before, self._kept, self._cuts = self._kept, {}, {}
        used = {kept.key for kept in kept_before.values()}
        rows: dict[int, int] = {}
        for number, record in enumerate(VM_RECORD.iter_unpack(blocks.vms)):
            kvm, _, start, tgid, vm_fd, first, count, window, flags, _, has_notify, missing = record
            if not tgid:
                continue
            if tgid > _INT_MAX or (first + count) * IDENTITY.size > len(blocks.identities):
                raise MalformedData("records of VMs", f"process {tgid} with {count} vCPUs from {first}")
            place = slice(first, first + count)
            identities = blocks.identities[first * IDENTITY.size : (first + count) * IDENTITY.size]
            facts = _Facts(window, flags, missing) if has_notify else _Facts(None, None, missing)
            kept = kept_before.get(kvm)
            if kept is None or kept.owner != (tgid, start):
                kept = _KeptVm((tgid, start), _choose_key(tgid, start, vm_fd, used), identities, facts)
            elif (kept.identities, kept.facts) != (identities, facts):
                # Its key is for life: a VM whose file moves to another fd is no new one.
                kept = _KeptVm(kept.owner, kept.key, identities, facts)
            used.add(kept.key)
            rows[kvm] = number
            self._kept[kvm], self._cuts[kvm] = kept, (place, kept.order)
        known = [self._counters[vm.key] if vm is kept_before.get(kvm) else None for kvm, vm in self._kept.items()]
        self._columns = [[counters and counters.per_vcpu[name] for counters in known] for name in self._names]
        self._statistics = [counters and counters.statistics for counters in known]
        if self._cutter:
            places = [
                VmPlace(rows[kvm], *self._cuts[kvm], bool(vm.vcpu_ids) and not vm.facts.missing)
                for kvm, vm in self._kept.items()
            ]
            self._cutter.place(places, self._statistics)


def _choose_key(tgid: int, start_boottime: int, vm_fd: int, used: Collection[VmKey]) -> VmKey:
    """A process may hold the vCPUs of several VMs but none of their files: then they are -1, -2 and so on."""
    key = VmKey(tgid, start_boottime // NS_PER_TICK, vm_fd)
    while vm_fd < 0 and key in used:
        key = key._replace(vm_fd=key.vm_fd - 1)
    return key


def find_unowned(vms: bytes) -> set[int]:
    """Return the addresses of VMs whose memory belongs to no living process."""
    return {record[0] for record in VM_RECORD.iter_unpack(vms) if not record[3]}


class _FoundVm:
    """A VM as the files of all processes show it."""

    def __init__(self) -> None:
        self.holders: dict[tuple[bool, int, int], int] = {}
        self.notify: tuple[int, ...] = (0, 0, 0)
        self.online_vcpus = 0
        self.vcpus: dict[int, tuple[int, Sequence[int]]] = {}


def decode_files(block: bytes, statistics: int, max_statistics: int, origin: str) -> HostBlocks:
    """Decode what read_files wrote into the blocks that read_vms gives.

    A VM belongs to the process whose memory it has, else to the one among its holders that started first; each vCPU
    counts once, however many fds there are of it. Raises MalformedData if a record is cut off, or
    names a process, thread or fd that cannot be.
    """
    values = struct.Struct(f"={max_statistics}Q")
    stride = FILE_RECORD.size + values.size
    if len(block) % stride:
        raise MalformedData(origin, f"{len(block)} bytes are no whole number of records of {stride}")
    vms: dict[int, _FoundVm] = {}
    for at in range(0, len(block), stride):
        kvm, start, tgid, fd, is_vcpu, is_owner, *notify, vcpu_id, tid, online = FILE_RECORD.unpack_from(block, at)
        if tgid > _INT_MAX or fd > _INT_MAX or tid < 0:
            raise MalformedData(origin, f"a record of process {tgid}, thread {tid}, fd {fd}")
        vm = vms.setdefault(kvm, _FoundVm())
        vm.notify, vm.online_vcpus = tuple(notify), online
        holder = (not is_owner, start, tgid)
        known = vm.holders.setdefault(holder, -1)
        if is_vcpu:
            vm.vcpus[vcpu_id] = (tid, values.unpack_from(block, at + FILE_RECORD.size)[:statistics])
        elif known < 0 or fd < known:
            vm.holders[holder] = fd
    return _as_blocks(vms, statistics)


def _as_blocks(vms: Mapping[int, _FoundVm], statistics: int) -> HostBlocks:
    records: list[bytes] = []
    identities: list[bytes] = []
    columns: tuple[list[int], ...] = tuple([] for _ in range(statistics))
    for kvm, vm in vms.items():
        (_, start, tgid), vm_fd = min(vm.holders.items())
        first = len(identities)
        for vcpu_id, (tid, values) in sorted(vm.vcpus.items()):
            identities.append(IDENTITY.pack(vcpu_id, tid))
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        window, flags, has_notify = vm.notify
        missing = max(0, vm.online_vcpus - len(vm.vcpus))
        place = (vm_fd, first, len(vm.vcpus))
        records.append(VM_RECORD.pack(kvm, 0, start, tgid, *place, window, flags, 0, has_notify, missing))
    return HostBlocks(b"".join(records), b"".join(identities), tuple(map(tuple, columns)))


def find_owner(vms: bytes, kvm: int) -> int | None:
    """Return the pid of the process that owns the VM at this address, 0 for none, None if there is no such VM."""
    return next((record[3] for record in VM_RECORD.iter_unpack(vms) if record[0] == kvm), None)


def has_gaps(vms: bytes) -> bool:
    """Tell whether a VM has vCPUs that were not read."""
    return any(record[11] for record in VM_RECORD.iter_unpack(vms))


def find_all(vms: bytes) -> set[int]:
    """Return the addresses of all VMs."""
    return {record[0] for record in VM_RECORD.iter_unpack(vms)}


def keep_vms(blocks: HostBlocks, wanted: Collection[int]) -> HostBlocks:
    """Keep only the VMs at these addresses."""
    records = [VM_RECORD.pack(*record) for record in VM_RECORD.iter_unpack(blocks.vms) if record[0] in wanted]
    return blocks._replace(vms=b"".join(records))


def join_blocks(blocks: HostBlocks, more: HostBlocks) -> HostBlocks:
    """Put two sets of blocks together, the same statistics in both."""
    shift = len(blocks.identities) // IDENTITY.size
    records = [VM_RECORD.pack(*r[:5], r[5] + shift, *r[6:]) for r in VM_RECORD.iter_unpack(more.vms)]
    columns = tuple(a + b for a, b in zip(blocks.columns, more.columns, strict=True))
    return HostBlocks(
        blocks.vms + b"".join(records),
        blocks.identities + more.identities,
        columns,
        blocks.vm_rows,
        blocks.stat_columns,
    )


def decode_state(block: bytes, length: int, statistics: Mapping[str, Statistic]) -> VcpuState:
    """Decode a struct vcpu_state with ``length`` bytes of statistics; one that lies beyond them is left out."""
    *registers, available, vcpu_id, tid, is_protected, vm_type = STATE_RECORD.unpack_from(block)
    raw = block[STATE_RECORD.size : STATE_RECORD.size + length]
    return VcpuState(
        vcpu_id,
        tid or None,
        MappingProxyType(dict(zip(REGISTERS, registers, strict=True))),
        frozenset(name for bit, name in enumerate(REGISTERS) if not available >> bit & 1),
        MappingProxyType(decode_values(statistics, raw)),
        None if is_protected == _NOT_KNOWN else bool(is_protected),
        None if vm_type == _NOT_KNOWN else vm_type,
    )
