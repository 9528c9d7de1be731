"""Tells of notify exits as they happen: BPF programs on entry to and return from ``handle_notify`` of kvm_intel.

KVM calls that function for notify exits only, so a host on which nothing happens pays nothing, and nobody needs to
poll counters. Its records come through a ring buffer whose ``fd`` an event loop can wait for. They are limited in the
kernel, per thread: a guest can take a notify exit every few microseconds, and must not keep us busy by that.

Where the function does not exist (AMD, kvm_intel not loaded, or before Linux kernel commit 2f4073e08f4c "KVM: VMX:
Enable Notify VM exit" (in v6.0)) no notify exit can happen either: that is a fact, told by ``TriggerStatus``, and no
error. Some hardened kernels refuse every program at the entry of a function while they allow iterators: then there is
no trigger, and the source ``bpf`` works all the same, which is why these programs are an object of their own.

While it is attached the kernel keeps the module that has the function: ``rmmod kvm_intel`` fails until ``close``.
"""

from __future__ import annotations

import errno
import mmap
import struct
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvm import abi
from kvm.bpf.bpf_object import BpfObject, RingBuffer
from kvm.bpf.btf import read_types
from kvm.bpf.libbpf import LIBRARY, Library, open_library
from kvm.bpf.refusals import check_own_pid, explain
from kvm.errors import MalformedData, SourceUnavailable
from kvm.host.privileges import read_is_module

OBJECT = Path(__file__).parent / "programs" / "notify.bpf.o"
FUNCTION = "handle_notify"
# The first notify exit of a thread is told of at once; that it goes on, after so long. After a bad microcode update
# every vCPU of a host may take them, and the record of each of 10,000 once a second takes some 5 % of a core.
AGAIN_SECONDS = 5.0
RING_BYTES = 256 * 1024
# Threads whose records are limited at a time.
MAX_THREADS = 16384

# struct control of notify.bpf.c: again_ns, exit_reason, flags, own_tgid, reserved, lost, uncounted.
# Native, so that each number is read whole while the programs write it.
_CONTROL = struct.Struct("@Q4I2Q")
_SETTINGS = struct.Struct("@Q2I")
# struct record: time_ns, tgid, tid, vcpu_id
_RECORD = struct.Struct("=Q3I4x")
# struct vcpu_thread: start_boottime, tgid, tid, vcpu_id; its value is a count
_THREAD = struct.Struct("=Q3I4x")
_COUNT = struct.Struct("=Q")
_NS_PER_SECOND = 1_000_000_000
_NS_PER_TICK = _NS_PER_SECOND // abi.USER_HZ


class NotifyCall(NamedTuple):
    """One call of the function: CLOCK_MONOTONIC, process, vCPU thread, KVM's vcpu_id."""

    time_ns: int
    pid: int
    tid: int
    vcpu_id: int


class VcpuThread(NamedTuple):
    """A thread that has run a vCPU; ``pid`` and ``start_ticks`` name its process as a VmKey does."""

    pid: int
    start_ticks: int
    tid: int
    vcpu_id: int


@dataclass(frozen=True, slots=True)
class TriggerStatus:
    """Whether the trigger is attached to ``function``, and if not, why."""

    function: str
    attached: bool
    reason: str = ""


class NotifyTrigger:
    """The trigger; ``on_call`` takes each record that ``deliver`` finds.

    ``function`` may be any kernel function of the shape ``int f(struct kvm_vcpu *)``. Returns of 0 with this
    ``exit_reason`` in the vCPU's struct kvm_run, and one of ``flags`` where it has notify.flags, are counted.
    ``ring_bytes``, a power of two and no less than a page, is the room for records that nobody has taken yet.
    What reads the counts and what detaches may be called from several threads: they wait for each other. ``deliver``
    waits for nobody, and must not be called while another thread opens or closes.
    """

    def __init__(
        self,
        on_call: Callable[[NotifyCall], None],
        *,
        function: str = FUNCTION,
        again_seconds: float = AGAIN_SECONDS,
        ring_bytes: int = RING_BYTES,
        exit_reason: int = abi.KVM_EXIT_NOTIFY,
        flags: int = abi.KVM_NOTIFY_CONTEXT_INVALID,
        library: str = LIBRARY,
        kallsyms: Path = Path("/proc/kallsyms"),
        sys: Path = Path("/sys"),
    ) -> None:
        self._on_call = on_call
        self._function = function
        self._settings = _SETTINGS.pack(round(again_seconds * _NS_PER_SECOND), exit_reason, flags)
        self._ring_bytes = ring_bytes
        self._library_name = library
        self._kallsyms = kallsyms
        self._sys = sys
        self._lock = threading.RLock()
        self._object: BpfObject | None = None
        self._control: mmap.mmap | None = None
        self._ring: RingBuffer | None = None

    def open(self) -> TriggerStatus:
        """Attach, where the function exists; raises SourceUnavailable where BPF does not work."""
        with self._lock:
            self.close()
            library = open_library(self._library_name)
            try:
                return self._open(library)
            except OSError as err:
                refusal = explain(err, library.messages.kept(), attaches=True)
                self.close()
                raise refusal from err
            except BaseException:
                self.close()
                raise

    @property
    def fd(self) -> int:
        """An fd that becomes readable when there is something to deliver; only while attached."""
        if self._ring is None:
            raise ValueError("the trigger is not attached")
        return self._ring.fd

    def deliver(self) -> int:
        """Hand what has come to ``on_call``, without waiting, and return how many records that were."""
        return 0 if self._ring is None else self._ring.consume()

    def read_context_invalid(self) -> dict[VcpuThread, int]:
        """Read how many exits with an invalid VM context each thread has taken since the trigger was attached.

        Exact; a vCPU that has changed threads has several entries. Raises OSError.
        """
        with self._lock:
            if self._object is None:
                return {}
            found = self._object.read_map("invalid_exits", _THREAD.size, _COUNT.size)
        return {_decode_thread(key): _COUNT.unpack(value)[0] for key, value in found.items()}

    def forget(self, ended: Collection[tuple[int, ...]]) -> None:
        """Forget the counts of what has ended: processes, by pid and start_ticks, or a VcpuThread; raises OSError."""
        with self._lock:
            if self._object is None:
                return
            for key in self._object.read_map("invalid_exits", _THREAD.size, _COUNT.size):
                thread = _decode_thread(key)
                if thread in ended or thread[:2] in ended:
                    self._object.delete_key("invalid_exits", key)

    @property
    def lost(self) -> tuple[int, int]:
        """How many calls could not be told of, and how many invalid exits found the table of counts full."""
        with self._lock:
            if self._control is None:
                return (0, 0)
            *_, lost, uncounted = _CONTROL.unpack_from(self._control)
            return (lost, uncounted)

    def close(self) -> None:
        """Detach, and take everything out of the kernel; may be called twice."""
        with self._lock:
            if self._ring is not None:
                self._ring.close()
                self._ring = None
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._object is not None:
                self._object.close()
                self._object = None

    def _open(self, library: Library) -> TriggerStatus:
        absent = TriggerStatus(self._function, False, f"no module of this kernel has {self._function}")
        exists = self._is_in_kernel()
        if exists is False:  # libbpf would read the types of the kernel and of all modules to say so
            return absent
        try:
            types = read_types(self._sys)
        except MalformedData as err:
            raise SourceUnavailable(str(err)) from err
        self._object = BpfObject(library, OBJECT, types)
        try:
            for program in ("on_entry", "on_return"):
                self._object.set_target(program, self._function)
        except OSError as err:
            if err.errno not in (errno.ESRCH, errno.ENOENT, errno.EPERM):
                raise
            # libbpf passes over modules whose types it may not read, and may not be let to search modules at all.
            if exists or err.errno == errno.EPERM or self._is_without_types():
                raise
            self.close()
            return absent
        self._object.set_entries("records", self._ring_bytes)
        self._object.set_entries("told_ns", library.count_lru_entries(MAX_THREADS))
        self._object.load()
        self._control = mmap.mmap(self._object.map_fd(".bss"), _CONTROL.size)
        self._object.run("learn")
        check_own_pid(_CONTROL.unpack_from(self._control)[3])
        self._control[: len(self._settings)] = self._settings
        self._ring = RingBuffer(library, self._object.map_fd("records"), self._take)
        # Counting first: what is told of has been counted then.
        self._object.attach("on_return")
        self._object.attach("on_entry")
        return TriggerStatus(self._function, True)

    def _is_in_kernel(self) -> bool | None:
        """Tell whether the kernel or a module has the function, None where that cannot be read."""
        names = (f" {self._function}\t".encode(), f" {self._function}\n".encode())
        found = None  # also where it is masked: then it is empty
        try:
            with self._kallsyms.open("rb") as lines:
                for line in lines:
                    found = line.find(names[0]) >= 0 or line.endswith(names[1])
                    if found:
                        break
        except OSError:
            return None
        return found

    def _is_without_types(self) -> bool:
        """Tell whether kvm_intel is a module of which nobody can say what functions it has."""
        is_module = read_is_module(self._sys / "module/kvm_intel")
        return is_module is True and not (self._sys / "kernel/btf/kvm_intel").exists()

    def _take(self, record: bytes) -> None:
        self._on_call(NotifyCall(*_RECORD.unpack_from(record)))


def _decode_thread(key: bytes) -> VcpuThread:
    start_boottime, tgid, tid, vcpu_id = _THREAD.unpack(key)
    return VcpuThread(tgid, start_boottime // _NS_PER_TICK, tid, vcpu_id)
