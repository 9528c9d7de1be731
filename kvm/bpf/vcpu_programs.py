"""Runs the programs of vcpus.bpf.c: bytes of kernel memory out, nothing understood.

No records are written, but columns, into arrays that are mapped into our memory: nothing is copied twice. An iterator
could not tell of a large VM anyway: what it writes of one task must fit into the 32 kB that the kernel keeps for it
(bpf_seq_read in kernel/bpf/bpf_iter.c answers E2BIG otherwise), and a VM can have 1,024 vCPUs and more.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

from kvm.bpf.bpf_object import BpfObject, read_iterator
from kvm.bpf.libbpf import Library
from kvm.bpf.vcpu_decode import IDENTITY, STATE_RECORD, VM_RECORD, HostBlocks, decode_files
from kvm.errors import MalformedData
from kvm.statistic_plan import NO_STATISTICS, StatPlan
from kvm.statistics import StatScope

OBJECT = Path(__file__).parent / "programs" / "vcpus.bpf.o"
# The same programs, which read the kernel's memory by instructions of their own and not by calls of a helper.
DIRECT_OBJECT = OBJECT.with_name("vcpus_direct.bpf.o")

# As in records.bpf.h
MAX_STATISTICS = 16
MAX_VMS = 16384
# VMs that have ended are forgotten by nobody until others take their place.
KEPT_VMS = 2 * MAX_VMS
STATISTICS_BYTES = 4096
MAX_WORDS = 512
MAX_TO_ADD = 64
# What a kernel may be able to run: everything; all but what reads registers; only the walk over open files
FILES_ONLY = ("learn", "read_files")
WITHOUT_STATE = (*FILES_ONLY, "learn_vm_list", "list_vms", "read_batch", "find_owners")
ALL = (*WITHOUT_STATE, "read_vcpu")
# No VM of ours: numbers that no fd can have
NO_FD = 0x7FFFFFFF
FILE_BUFFER_BYTES = 1 << 18

# struct control of records.bpf.h; its fields lie side by side without gaps
CONTROL_FIELDS = (
    *((name, "Q") for name in ("vm_fops", "vcpu_fops", "vm_list")),
    *((name, "I") for name in ("statistics", "vcpu_capacity")),
    ("stat_offsets", f"{MAX_STATISTICS}I"),
    *((name, "I") for name in ("own_vm_fd", "own_vcpu_fd")),
    ("wanted_vm", "Q"),
    *((name, "I") for name in ("wanted_vcpu_id", "wanted_bytes", "own_tgid", "found")),
    *((name, "I") for name in ("exits_offset", "notify_window_exits_offset")),
    *((name, "I") for name in ("round", "vms", "vcpus", "broken", "next_vm", "unowned", "slots", "strange")),
    *((name, "I") for name in ("vm_words", "sum_words", "vcpu_words", "vcpu_values", "vm_stat_bytes")),
    ("vcpu_stat_bytes", "I"),
    ("wanted_words", f"{MAX_WORDS}I"),
    ("row", f"{MAX_WORDS}Q"),
    ("to_add", f"{MAX_TO_ADD}Q"),
    ("adding", "I"),
    ("reserved", "I"),
)
CONTROL_BYTES = struct.calcsize("=" + "".join(format_ for _, format_ in CONTROL_FIELDS))


class Control:
    """The struct control that lies in ``memory``, shared with the programs while they are loaded."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._places: dict[str, tuple[int, struct.Struct]] = {}
        at = 0
        for name, format_ in CONTROL_FIELDS:
            self._places[name] = (at, struct.Struct("=" + format_))
            at += self._places[name][1].size

    def read(self, name: str) -> int:
        """Read a field of one number."""
        at, place = self._places[name]
        number: int = place.unpack_from(self._memory, at)[0]
        return number

    def write(self, **numbers: int) -> None:
        """Write fields of one number each."""
        for name, number in numbers.items():
            at, place = self._places[name]
            place.pack_into(self._memory, at, number)

    def write_offsets(self, offsets: Sequence[int]) -> None:
        """Write the places of the wanted statistics, and how many they are."""
        at, place = self._places["stat_offsets"]
        place.pack_into(self._memory, at, *offsets, *[0] * (MAX_STATISTICS - len(offsets)))
        self.write(statistics=len(offsets))

    def write_words(self, words: Sequence[int]) -> None:
        """Write which words of KVM's structs of statistics are wanted."""
        at, place = self._places["wanted_words"]
        place.pack_into(self._memory, at, *words, *[0] * (MAX_WORDS - len(words)))

    def take_over(self, other: Control) -> None:
        """Take over everything that other programs were told and have learnt, but for the room that they have."""
        capacity = self.read("vcpu_capacity")
        self._memory[:CONTROL_BYTES] = other._memory[:CONTROL_BYTES]
        self.write(vcpu_capacity=capacity)


class ListChanged(Exception):
    """KVM's list of VMs changed while it was walked: read again."""


class RoomNeeded(Exception):
    """The host has more vCPUs than there is room for; ``vcpus`` says how many."""

    def __init__(self, vcpus: int) -> None:
        super().__init__(f"{vcpus} vCPUs")
        self.vcpus = vcpus


class VcpuPrograms:
    """The loaded programs ``names`` of the object ``path``, with room for ``capacity`` vCPUs of ``statistics`` values.

    ``plan`` says what else ``read_vms`` reads once ``read_statistics`` was called. ``types`` is the BTF that
    says where KVM's structs have their fields, None for vmlinux's. Construction raises OSError (libbpf's messages say
    more).
    """

    def __init__(
        self,
        library: Library,
        capacity: int,
        statistics: int,
        names: Sequence[str] = ALL,
        types: bytes | None = None,
        *,
        plan: StatPlan = NO_STATISTICS,
        path: Path = OBJECT,
    ) -> None:
        self.library = library
        self.names = tuple(names)
        self.path = path
        self._object = BpfObject(library, path, types)
        self._maps: list[mmap.mmap] = []
        self._links: dict[str, int] = {}
        self._buffer = bytearray(FILE_BUFFER_BYTES)
        self._capacity = capacity
        self._columns: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self._plan = plan
        sums = len(plan.vcpu_words) if plan.table.level is StatScope.VM else 0
        self._row_bytes = 8 * (len(plan.vm_words) + sums)
        self._stat_columns = len(plan.vcpu_words) - sums
        self._columns_at = MAX_VMS * self._row_bytes
        try:
            for name in set(ALL) - set(names):
                self._object.skip_program(name)
            for name in ("owners", "unowned_vms"):
                self._object.set_entries(name, library.count_lru_entries(KEPT_VMS))
            self._object.set_entries("vcpus", capacity)
            self._object.set_entries("values", capacity * max(1, statistics))
            if wanted := plan.vm_words + plan.vcpu_words:
                self._object.set_entries("stat_values", self._columns_at // 8 + capacity * self._stat_columns)
            self._object.load()
            self.control = Control(self._map(".bss", CONTROL_BYTES, mmap.PROT_WRITE))
            self.control.write(vcpu_capacity=capacity)
            self._vms = self._map("vms", MAX_VMS * VM_RECORD.size)
            self._vcpus = self._map("vcpus", capacity * IDENTITY.size)
            self._values = self._map("values", capacity * max(1, statistics) * 8)
            self._state = self._map("vcpu_state", STATE_RECORD.size + STATISTICS_BYTES)
            if wanted:
                self._stats = self._map("stat_values", self._columns_at + capacity * self._stat_columns * 8)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the programs and maps out of the kernel again; may be called twice."""
        while self._maps:
            self._maps.pop().close()
        self._object.close()

    def learn(self, vm_fd: int = NO_FD, vcpu_fd: int = NO_FD) -> bool:
        """Learn what KVM's files look like from a VM and vCPU of ours, and say if that worked; raises OSError.

        Without fds, only what every kernel tells is learnt: our pid as BPF sees it, and the places of two counters.
        """
        self.control.write(own_vm_fd=vm_fd, own_vcpu_fd=vcpu_fd)
        self._object.run("learn")
        return bool(self.control.read("found"))

    def learn_vm_list(self) -> bool:
        """Find the head of KVM's list of VMs from the VM that ``learn`` saw, and say if that worked; raises OSError."""
        self._object.run("learn_vm_list")
        return bool(self.control.read("found"))

    def read_vms(self) -> HostBlocks:
        """Read every VM by KVM's list; raises OSError, ListChanged, RoomNeeded."""
        control = self.control
        round_ = (control.read("round") + 1) & 0xFFFFFFFF
        control.write(round=round_, vms=0, vcpus=0, broken=1, next_vm=0, unowned=0, slots=0)
        self._object.run("list_vms")
        if control.read("broken"):
            raise ListChanged
        before, vms = -1, control.read("vms")
        while (read := control.read("next_vm")) < vms:
            if read == before:
                raise OSError(f"read_batch stands still at {read} of {vms} VMs")
            before = read
            self._object.run("read_batch")
        if control.read("unowned"):
            for _ in read_iterator(self.library, self._link("find_owners"), self._buffer):
                raise OSError("find_owners wrote records")  # it has none to write
        count = control.read("vcpus")
        if count > self._capacity:
            raise RoomNeeded(count)
        starts = range(0, control.read("statistics") * self._capacity * 8, self._capacity * 8)
        return HostBlocks(
            self._vms[: control.read("vms") * VM_RECORD.size],
            self._vcpus[: count * IDENTITY.size],
            tuple(self._take_column(start, count) for start in starts),
            *self._take_statistics(count),
        )

    def _take_column(self, start: int, vcpus: int) -> tuple[int, ...]:
        """Take one statistic of all vCPUs: what has not moved, as most notify counters, need not be unpacked again."""
        raw = self._values[start : start + 8 * vcpus]
        raw_before, column = self._columns.get(start, (b"", ()))
        if raw != raw_before:
            column = struct.unpack(f"={vcpus}Q", raw)
            self._columns[start] = raw, column
        return column

    def read_statistics(self) -> None:
        """Let ``read_vms`` read what the plan says, too; programs that take over from these do as well."""
        plan, sums = self._plan, self._row_bytes // 8 - len(self._plan.vm_words)
        self.control.write_words(plan.vm_words + plan.vcpu_words)
        self.control.write(
            vm_words=len(plan.vm_words),
            sum_words=sums,
            vcpu_words=self._stat_columns,
            vcpu_values=self._columns_at // 8,
            vm_stat_bytes=8 * (max(plan.vm_words, default=-1) + 1),
            vcpu_stat_bytes=8 * (max(plan.vcpu_words, default=-1) + 1),
        )

    def forget_statistics(self) -> None:
        """Let ``read_vms`` read none of what the plan says."""
        words = dict.fromkeys(("vm_words", "sum_words", "vcpu_words", "vm_stat_bytes", "vcpu_stat_bytes"), 0)
        self.control.write(**words)

    def _take_statistics(self, vcpus: int) -> tuple[bytes, tuple[tuple[int, ...], ...]]:
        control = self.control
        rows = b""
        if control.read("vm_words") + control.read("sum_words"):
            rows = self._stats[: control.read("vms") * self._row_bytes]
        column, length = struct.Struct(f"={vcpus}Q"), self._capacity * 8
        starts = (self._columns_at + length * number for number in range(control.read("vcpu_words")))
        return rows, tuple(column.unpack_from(self._stats, start) for start in starts)

    def read_files(self) -> HostBlocks:
        """Read every VM by the open files of all processes; raises OSError, MalformedData.

        Malformed is also what has a vCPU's name and is none by the types that we have: then they are of another KVM.
        """
        self.control.write(strange=0)
        block = b"".join(map(bytes, read_iterator(self.library, self._link("read_files"), self._buffer)))
        if strange := self.control.read("strange"):
            raise MalformedData("files called a vCPU's", f"{strange} lead to none where the kernel's types say")
        return decode_files(block, self.control.read("statistics"), MAX_STATISTICS, "records of read_files")

    def read_vcpu(self, vm: int, vcpu_id: int, statistics_bytes: int) -> bytes | None:
        """Read one vCPU in full (struct vcpu_state), None if there is no such; raises OSError, ListChanged."""
        self.control.write(wanted_vm=vm, wanted_vcpu_id=vcpu_id, wanted_bytes=statistics_bytes)
        self._object.run("read_vcpu")
        if self.control.read("broken"):
            raise ListChanged
        return self._state[: STATE_RECORD.size + STATISTICS_BYTES] if self.control.read("found") else None

    def map_fd(self, name: str) -> int:
        """Return the fd of a map, which the programs own."""
        return self._object.map_fd(name)

    def _map(self, name: str, length: int, protection: int = 0) -> mmap.mmap:
        fd = self.map_fd(name)
        self._maps.append(mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | protection))
        return self._maps[-1]

    def _link(self, program: str) -> int:
        if program not in self._links:
            self._links[program] = self._object.attach_iterator(program)
        return self._links[program]
