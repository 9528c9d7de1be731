"""Reads the binary stats fds that a VMM holds: every vCPU of QEMU 8.1 and later.

At every snapshot each fd is duplicated (pidfd_getfd), read (pread) and closed at once, because a duplicate keeps the
whole VM alive: vCPUs, its debugfs directory, the kvm module. On older kernels it does not even do that, and reading
after the VM's end is a use after free. Linux kernel commit eed3013faa40 "KVM: Grab a reference to KVM for VM and vCPU
stats file descriptors" (in v6.5 and stable trees) brought ``kvm_vcpu_stats_release``: without that name in
/proc/kallsyms this source refuses to work.

So no fd is kept from one snapshot to the next, although that is what reading costs: of 5.3 us of CPU time a vCPU,
borrowing and closing take 2.0, reading 1.0, the checks below 1.1, Python around them the rest (Linux 6.18, Python
3.11). A plain C program borrows, reads, closes and prints in 2.0. io_uring cannot borrow fds.

Only pread: a duplicate shares its file offset with the VMM.

Where KVM has the project's patches (``kvm/patches``), all statistics of single vCPUs are read besides: they tell where
notify exits were. Registers are not to be had this way.

An fd number may hold another file by now, and a VMM that is not honest could put a forged one there. So a file is known
by its link when a VM is first read; afterwards, because reading a link costs more than all the rest (5.1 us of 11 us a
vCPU, measured on Linux 6.18), by three cheaper marks: it is on the kernel's own file system for anonymous inodes, it is
open for reading only, and it begins with the same header and id. Of all such files only KVM's statistics allow pread,
so no program can forge one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from kvm import abi, binary_stats, syscalls
from kvm.counters.stats_layout import FileLayout, decode_layout, join_tables
from kvm.discovery.processes import open_pidfd, read_stat
from kvm.discovery.vm_discovery import HeldVm
from kvm.errors import MalformedData, SourceUnavailable, VmGone
from kvm.host.privileges import read_privileges
from kvm.host.throwaway_vm import ThrowawayVm, read_descriptors
from kvm.model import RIP_STATISTICS, VcpuState, VmCounters, VmKey
from kvm.statistics import StatScope, StatSelection, StatTable, VmStatistics

_SAFE_SYMBOL = b" kvm_vcpu_stats_release"
_KVM_SYMBOL = b" kvm_vcpu_ioctl"
# Instead of a vcpu_id: the file of the VM itself.
_THE_VM = -1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _KnownFile:
    """A statistics file that was known by its link: its layout, and how it begins (header and id)."""

    layout: FileLayout
    beginning: bytes


def check_safe_to_borrow(kallsyms: Path) -> None:
    """Make sure that this kernel keeps a VM alive while a duplicate of its stats fd is read.

    Raises SourceUnavailable where it does not, or where that cannot be known.
    """
    has_kvm, is_empty = False, True
    try:
        with kallsyms.open("rb", buffering=0) as file:
            end = b""  # a name may lie across two pieces
            while piece := file.read(1 << 16):
                is_empty = False
                if _SAFE_SYMBOL in end + piece:
                    return
                has_kvm = has_kvm or _KVM_SYMBOL in end + piece
                end = piece[-len(_SAFE_SYMBOL) :]
    except OSError as err:
        reason = f"{kallsyms} cannot be read ({err.strerror}), so it is not known whether reading is safe"
        raise SourceUnavailable(reason, "in a unit: ProtectKernelTunables=no") from err
    if is_empty:
        reason = f"{kallsyms} is masked, so it is not known whether reading is safe"
        raise SourceUnavailable(reason, "in a unit: ProtectKernelTunables=no")
    if not has_kvm:
        raise SourceUnavailable("KVM is not loaded", "modprobe kvm_intel or kvm_amd, if VMs are to run here")
    raise SourceUnavailable(
        "reading is unsafe on this kernel: it has no kvm_vcpu_stats_release",
        "use Linux 6.5, 6.4.8, 6.1.43, 5.15.124 or later",
    )


class StatsFdSource:
    """The CounterSource ``stats_fd``. ``wanted`` names the counters, ``selection`` what is to be read besides.

    ``on_error`` takes (VM, kind, message). A VM's own statistics are read where its VMM holds a stats fd of the VM,
    which QEMU does not.
    """

    name = "stats_fd"
    finds_vms = False
    limits = ""

    def __init__(
        self,
        wanted: Sequence[str],
        on_error: Callable[[VmKey, str, str], None],
        kallsyms: Path = Path("/proc/kallsyms"),
        device: Path = Path("/dev/kvm"),
        selection: StatSelection | None = None,
        *,
        proc: Path = Path("/proc"),
    ) -> None:
        self._device, self._proc = device, proc
        self._selection = selection
        self.doubt = "it is not open"
        self.is_open = False
        self.tells_rips = False
        """Whether ``read_vcpu`` has KVM's own word for where notify exits are: KVM has the project's patches."""
        self._lock = threading.RLock()
        self._wanted = tuple(wanted)
        self._on_error = on_error
        self._kallsyms = kallsyms
        self._known: dict[VmKey, dict[int, _KnownFile]] = {}
        self._held: dict[VmKey, HeldVm] = {}
        self._layouts: dict[StatScope, tuple[bytes, FileLayout]] = {}
        self._tables: tuple[StatTable | None, StatTable, StatTable] | None = None
        self._anonymous_device = -1

    def open(self) -> None:
        """Check that borrowing is safe on this kernel, and try it; raises SourceUnavailable."""
        check_safe_to_borrow(self._kallsyms)
        self.doubt = self._try_own_vm() or self._try_other_process()
        own = os.eventfd(0, os.EFD_CLOEXEC)
        self._anonymous_device = os.fstat(own).st_dev
        os.close(own)
        self.is_open = True

    def read(self, vms: Sequence[HeldVm], *, again: bool = False) -> dict[VmKey, VmCounters]:
        """Read these VMs; one whose process has ended has no entry, one without stats fds says so."""
        with self._lock:
            if not again:
                self._held = {}
            readings = self._read(vms)
            self._held |= {vm.key: vm for vm in vms if vm.key in readings}
            self._known = {key: files for key, files in self._known.items() if key in self._held}
            return readings

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None:
        """Read all statistics of one vCPU of the newest snapshot, None if it is gone or has no stats fd.

        What else a VcpuState has is not known. Raises SourceUnavailable where KVM does not tell RIPs: then there is
        nothing in it that counters do not have.
        """
        with self._lock:
            if not self.tells_rips:
                raise SourceUnavailable("stats fds tell of no registers")
            vm = self._held.get(key)
            if vm is None or vcpu_id not in vm.stats_fds:
                return None
            try:
                statistics = self._read_statistics(vm, vcpu_id)
            except (VmGone, FileNotFoundError, ProcessLookupError):
                return None
            except MalformedData as err:
                self._on_error(key, "malformed", str(err))
                return None
            except OSError as err:
                self._on_error(key, "unreadable", f"cannot borrow its stats fds: {err.strerror}")
                return None
        return VcpuState(vcpu_id, None, {}, frozenset(), statistics)

    def _read(self, vms: Sequence[HeldVm]) -> dict[VmKey, VmCounters]:
        readings = {}
        for vm in vms:
            try:
                readings[vm.key] = self._read_vm(vm)
            except VmGone:
                continue
            except MalformedData as err:
                self._on_error(vm.key, "malformed", str(err))
                readings[vm.key] = VmCounters(problem=str(err))
            except OSError as err:
                self._on_error(vm.key, "unreadable", f"cannot borrow its stats fds: {err.strerror}")
                readings[vm.key] = VmCounters(problem=f"cannot borrow its stats fds: {err.strerror}")
        if self.doubt and any(counters.per_vcpu for counters in readings.values()):
            self.doubt = ""
        return readings

    def close(self) -> None:
        """Hold nothing: there is nothing to give back."""
        self.is_open = self.tells_rips = False

    def _try_own_vm(self) -> str:
        """Borrow a stats fd of a VM of our own and read it; returns why that could not be tried, "" where it worked."""
        try:
            pidfd = os.pidfd_open(os.getpid())
        except OSError as err:
            raise SourceUnavailable(f"pidfd_open(2): {err.strerror}", "let the service call it") from err
        try:
            with ThrowawayVm(self._device) as vm:
                try:
                    borrowed = syscalls.pidfd_getfd(pidfd, vm.stats_fd)
                except OSError as err:
                    reason = f"fds cannot be borrowed: {err.strerror}, even from ourselves"
                    raise SourceUnavailable(reason, "let the service call pidfd_getfd(2)") from err
                try:
                    self.tells_rips = read_descriptors(borrowed).keys() >= set(RIP_STATISTICS)
                finally:
                    os.close(borrowed)
        except (OSError, MalformedData) as err:
            return f"nothing has been read yet: no VM of our own to try it with ({err})"
        finally:
            os.close(pidfd)
        return ""

    def _try_other_process(self) -> str:
        """Borrow an fd of process 1, whoever's it is; returns why other processes' fds cannot be had.

        Process 1 may be out of bounds even to root: a refusal counts only where the capability is missing too.
        """
        try:
            pidfd = os.pidfd_open(1)
        except OSError:
            return ""  # in a pid namespace without one: the first VM will tell
        try:
            os.close(syscalls.pidfd_getfd(pidfd, 0))
        except PermissionError:
            if not read_privileges(self._proc).lacks("CAP_SYS_PTRACE"):
                return ""
            return "other processes' fds cannot be borrowed, and nothing has been read yet; give CAP_SYS_PTRACE"
        except OSError:
            return ""  # that fd is closed: it was allowed to ask
        finally:
            os.close(pidfd)
        return ""

    def _read_vm(self, vm: HeldVm) -> VmCounters:
        if not vm.stats_fds or vm.pidfd < 0:
            return VmCounters(problem="its VMM holds no stats fds (QEMU does from 8.1 on)")
        known = self._known.setdefault(vm.key, {})
        vcpu_ids = tuple(sorted(vm.stats_fds))
        blocks = [self._read_file(vm, vcpu_id, vm.stats_fds[vcpu_id], known) for vcpu_id in vcpu_ids]
        layout = known[vcpu_ids[0]].layout
        rows = [layout.values.unpack_from(block) for block in blocks]
        statistics = self._take_statistics(vm, layout, blocks) if layout.table else None
        per_vcpu = dict(zip(layout.names, zip(*rows, strict=True), strict=True))
        return VmCounters(vcpu_ids, (None,) * len(vcpu_ids), per_vcpu, statistics=statistics)

    def _take_statistics(self, vm: HeldVm, layout: FileLayout, blocks: Sequence[bytes]) -> VmStatistics | None:
        of_vcpus, (table, of_vm) = layout.table, self._read_vm_statistics(vm)
        if of_vcpus is None:
            return None
        # One kernel describes all its VMs alike, so that there is one table, or two.
        if self._tables is None or self._tables[0] is not table or self._tables[1] is not of_vcpus:
            self._tables = (table, of_vcpus, join_tables(table, of_vcpus))
        columns = tuple(zip(*map(layout.pick, blocks), strict=True))
        if of_vcpus.level is StatScope.VCPU:
            return VmStatistics(self._tables[2], of_vm, None, columns or None)
        # A vCPU that has no stats fd would be missing in the sums.
        is_whole = vm.vcpu_ids is not None and len(vm.vcpu_ids) <= len(blocks)
        return VmStatistics(self._tables[2], of_vm, tuple(map(sum, columns)) if columns and is_whole else None)

    def _read_vm_statistics(self, vm: HeldVm) -> tuple[StatTable | None, tuple[int, ...] | None]:
        """Read the VM's own statistics, if its VMM holds a stats fd of it; a failure there costs nothing else."""
        if vm.vm_stats_fd is None:
            return None, None
        known = self._known[vm.key]
        try:
            block = self._read_file(vm, _THE_VM, vm.vm_stats_fd, known)
        except (OSError, MalformedData, VmGone) as err:
            # QEMU opens one for a moment, to answer query-stats: that it is gone is normal.
            log.debug("a VM's own statistics cannot be read", extra={"fields": {"err": str(err)}})
            return None, None
        layout = known[_THE_VM].layout
        return layout.table, layout.pick(block) or None

    def _read_statistics(self, vm: HeldVm, vcpu_id: int) -> dict[str, tuple[int, ...]]:
        """Read a vCPU between two snapshots: by now the process may have ended, and its pidfd be another's."""
        with ExitStack() as stack:
            pidfd = open_pidfd(vm.key.pid, vm.tid)
            stack.callback(os.close, pidfd)
            if read_stat(self._proc, vm.key.pid).start_ticks != vm.key.start_ticks:
                raise VmGone(f"process {vm.key.pid} is another one by now")
            known = self._known.setdefault(vm.key, {})
            block = self._read_file(replace(vm, pidfd=pidfd), vcpu_id, vm.stats_fds[vcpu_id], known, is_whole=True)
        layout = known[vcpu_id].layout
        return binary_stats.decode_values(layout.described, block[layout.data_offset :])

    def _read_file(
        self, vm: HeldVm, vcpu_id: int, number: int, known: dict[int, _KnownFile], *, is_whole: bool = False
    ) -> bytes:
        try:
            fd = syscalls.pidfd_getfd(vm.pidfd, number)
        except OSError as err:
            if err.errno in (errno.ESRCH, errno.EBADF):  # EBADF: an exiting process has lost its files already
                raise VmGone(describe_origin(vm, vcpu_id)) from err
            raise
        try:
            if vcpu_id not in known:
                known[vcpu_id] = self._meet(fd, vcpu_id, describe_origin(vm, vcpu_id))
            file = known[vcpu_id]
            if os.fstat(fd).st_dev != self._anonymous_device or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE:
                raise MalformedData(describe_origin(vm, vcpu_id), "the fd holds another file by now")
            length = file.layout.whole_length if is_whole else file.layout.length
            block = os.pread(fd, length, 0)
        finally:
            os.close(fd)
        if not block.startswith(file.beginning):
            del known[vcpu_id]  # another vCPU's file may have taken its place: it is met anew at the next snapshot
            raise MalformedData(describe_origin(vm, vcpu_id), "the fd holds another file by now")
        if len(block) < length:
            raise MalformedData(describe_origin(vm, vcpu_id), f"{len(block)} bytes of counters, {length} expected")
        return block

    def _meet(self, fd: int, vcpu_id: int, origin: str) -> _KnownFile:
        name = "kvm-vm-stats" if vcpu_id == _THE_VM else f"kvm-vcpu-stats:{vcpu_id}"
        if os.readlink(f"/proc/self/fd/{fd}") != f"anon_inode:{name}":
            raise MalformedData(origin, "the fd holds another file by now")
        raw_header = os.pread(fd, abi.KVM_STATS_HEADER.size, 0)
        header = binary_stats.decode_header(raw_header, origin)
        descriptors = os.pread(fd, header.desc_bytes, header.desc_offset)
        described = raw_header + descriptors
        scope, wanted = (StatScope.VM, ()) if vcpu_id == _THE_VM else (StatScope.VCPU, self._wanted)
        if self._layouts.get(scope, (b"",))[0] != described:  # one kernel describes all its vCPUs alike
            layout = decode_layout(header, descriptors, scope, wanted, selection=self._selection, origin=origin)
            self._layouts[scope] = described, layout
            if scope is StatScope.VCPU:
                self.tells_rips = layout.described.keys() >= set(RIP_STATISTICS)
        return _KnownFile(self._layouts[scope][1], os.pread(fd, header.id_offset + header.name_size, 0))


def describe_origin(vm: HeldVm, vcpu_id: int) -> str:
    """Say where a vCPU's bytes come from, for messages."""
    return f"stats fd of pid {vm.key.pid}" + ("" if vcpu_id == _THE_VM else f", vcpu_id {vcpu_id}")
