"""Reads KVM's debugfs: the sum over a VM's vCPUs, the last resort; and which thread runs which vCPU.

A VM's directory is ``TID-FD``: the thread (in the initial pid namespace) that made the VM, and the VM's fd number
(kvm_create_vm_debugfs in virt/kvm/kvm_main.c). There is no per-vCPU file of a counter. Under lockdown (Secure Boot) the
counters answer EPERM even to root, because their mode is 0644 (debugfs_locked_down in fs/debugfs/file.c); ``vcpuN/pid``
and the directories themselves stay readable. A refused open also writes a line to the kernel log: so whether the source
works is tried once, and not again on every snapshot.

An open file keeps its VM alive: each is opened, read and closed at once. Nothing is ever written: a 0 would clear the
counters for everybody. ``mmu_rmaps_stat`` is never read: it takes KVM's locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from kvm.binary_stats import MAX_DATA_BYTES
from kvm.discovery.vm_discovery import HeldVm
from kvm.errors import MalformedData, SourceUnavailable
from kvm.host.lockdown import Lockdown, read_lockdown
from kvm.host.privileges import Privileges, read_initial_pid_namespace, read_privileges
from kvm.host.throwaway_vm import ThrowawayVm
from kvm.model import VmCounters, VmKey
from kvm.statistic_plan import plan_statistics
from kvm.statistics import StatDescriptor, StatScope, StatSelection, StatTable, VmStatistics

CLOSED = "the kernel's lockdown forbids reading counters in debugfs"
_VM_DIRECTORY = re.compile(r"(\d{1,10})-(\d{1,10})")
_VCPU_DIRECTORY = re.compile(r"vcpu(\d{1,10})")


def parse_counter(text: str, origin: str) -> int:
    """Return the number in a statistics file; raises MalformedData."""
    number = text.strip()
    if not number.isascii() or not number.isdigit() or len(number) > len(str(2**64)):
        raise MalformedData(origin, f"no number: {text[:40]!r}")
    return int(number)


def find_vm_directory(kvm_directory: Path, proc: Path, key: VmKey) -> Path | None:
    """Find a VM's directory: the one made by a thread of its process, with its fd number; None where it is not told.

    A VMM that has moved its VM fd, or whose creating thread has ended, has no directory that can be told to be its own.
    """
    usual = kvm_directory / f"{key.pid}-{key.vm_fd}"
    try:
        if usual.is_dir():
            return usual
        for match in filter(None, map(_VM_DIRECTORY.fullmatch, os.listdir(kvm_directory))):
            if int(match[2]) == key.vm_fd and (proc / str(key.pid) / "task" / match[1]).is_dir():
                return kvm_directory / match[0]
    except OSError:
        return None  # it may not be looked into
    return None


def read_vcpu_tids(directory: Path) -> dict[int, int]:
    """Read which host thread last ran each vCPU, by vcpu_id; a vCPU that never ran is left out.

    ``vcpuN/pid`` exists since Linux 6.0; where it does not, the answer is empty. Thread ids are those of the first pid
    namespace.
    """
    tids = {}
    for vcpu_id in find_vcpu_ids(directory):
        with contextlib.suppress(OSError, MalformedData):  # older kernel or ended VM: not known
            path = directory / f"vcpu{vcpu_id}" / "pid"
            tids[vcpu_id] = parse_counter(path.read_text(), str(path))
    return {vcpu_id: tid for vcpu_id, tid in tids.items() if tid > 0}


def find_vcpu_ids(directory: Path) -> tuple[int, ...]:
    """List the vCPUs that a VM's directory shows, ascending; empty where the VM has ended."""
    try:
        names = os.listdir(directory)
    except OSError:
        return ()
    return tuple(sorted(int(match[1]) for match in filter(None, map(_VCPU_DIRECTORY.fullmatch, names))))


def may_hold_vms(kvm_directory: Path, proc: Path, pids: Collection[int]) -> bool:
    """Tell whether one of these processes may hold a VM: one was made by a thread of theirs, or by nobody knows whom.

    For processes whose fds may not be read. Numbers are those of the initial pid namespace.
    """
    if not pids:
        return False
    try:
        makers = {match[1] for match in filter(None, map(_VM_DIRECTORY.fullmatch, os.listdir(kvm_directory)))}
        return any(
            not (proc / tid).exists() or any((proc / str(pid) / "task" / tid).exists() for pid in pids)
            for tid in makers
        )
    except OSError:
        return True  # one of the two may not be looked into


class DebugfsSource:
    """The CounterSource ``debugfs``; ``kvm_directory`` is debugfs's ``kvm``; ``on_error`` is told of troubles.

    ``selection`` is what is to be read besides ``wanted``: a VM's own statistics, and sums over its vCPUs. Files have
    no types, so those are taken from a VM of our own on ``device``; of a histogram a file has the first bucket only.
    """

    name = "debugfs"
    finds_vms = False
    doubt = ""  # opening a counter is what may be refused, and that is tried

    def __init__(
        self,
        wanted: Sequence[str],
        kvm_directory: Path,
        proc: Path,
        on_error: Callable[[VmKey, str, str], None],
        sysfs: Path = Path("/sys"),
        *,
        selection: StatSelection | None = None,
        device: Path = Path("/dev/kvm"),
    ) -> None:
        self._selection, self._device = selection, device
        self._table: StatTable | None = None
        self.limits = ""
        self._wanted = tuple(wanted)
        self._kvm_directory = kvm_directory
        self._proc, self._sysfs = proc, sysfs
        self._on_error = on_error
        self._directories: dict[VmKey, Path | None] = {}

    def open(self) -> None:
        """Try the host's sum of one counter, without reading it: that would take KVM's global lock.

        Raises SourceUnavailable; also in a pid namespace of our own, where its directories name strangers' threads.
        """
        if not read_initial_pid_namespace(self._proc):
            raise SourceUnavailable("its directories are named in the host's pid namespace", "run with hostPID: true")
        path = self._kvm_directory / self._wanted[0]
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError as err:
            if self._kvm_directory.is_dir():
                raise SourceUnavailable(f"this kernel has no {path}", "Linux 6.0 or later has it") from err
            absence = f"{self._kvm_directory} is not there"
            if read_lockdown(self._sysfs).mode not in ("", "none"):  # to mount it would be in vain
                raise SourceUnavailable(f"{absence}; {CLOSED}") from err
            raise SourceUnavailable(absence, "mount -t debugfs none /sys/kernel/debug; load kvm") from err
        except PermissionError as err:
            lockdown = read_lockdown(self._sysfs)
            raise explain_refusal(err, lockdown, read_privileges(self._proc, self._sysfs)) from err
        except OSError as err:
            raise SourceUnavailable(f"{path}: {err.strerror}") from err
        self.limits, self._table = "", None
        if self._selection:
            try:
                self._table = self._choose_statistics(self._selection)
            except (OSError, MalformedData) as err:
                self.limits = f"without the statistics of --collector.stats: no VM of our own tells their types: {err}"

    def _choose_statistics(self, selection: StatSelection) -> StatTable:
        with ThrowawayVm(self._device) as vm:
            table = plan_statistics(selection, vm.vm_statistics, vm.statistics, MAX_DATA_BYTES).table

        def has_file(descriptor: StatDescriptor) -> bool:
            return not descriptor.is_histogram and (self._kvm_directory / descriptor.name).exists()

        summed = table.vcpu if table.level is StatScope.VM else ()
        vms, vcpus = tuple(filter(has_file, table.vm)), tuple(filter(has_file, summed))
        return StatTable(table.level, vms, vcpus, table.left_out)

    def read(self, vms: Sequence[HeldVm], *, again: bool = False) -> dict[VmKey, VmCounters]:
        """Read the sums of these VMs; one whose directory is not found says so, one that has ended has no entry."""
        readings = {}
        for vm in vms:
            if self._directories.get(vm.key) is None:
                self._directories[vm.key] = find_vm_directory(self._kvm_directory, self._proc, vm.key)
            directory = self._directories[vm.key]
            if directory is None:
                readings[vm.key] = VmCounters(problem="no debugfs directory can be told to be its own")
                continue
            try:
                readings[vm.key] = self._read_totals(directory)
            except FileNotFoundError:
                self._directories[vm.key] = None
            except (OSError, MalformedData) as err:
                self._on_error(vm.key, "malformed" if isinstance(err, MalformedData) else "unreadable", str(err))
                readings[vm.key] = VmCounters(problem=str(err))
        if not again:
            self._directories = {key: path for key, path in self._directories.items() if key in readings}
        return readings

    def close(self) -> None:
        """Hold nothing: there is nothing to give back."""

    def _read_totals(self, directory: Path) -> VmCounters:
        totals = {name: parse_counter((directory / name).read_text(), str(directory / name)) for name in self._wanted}
        vcpu_ids = find_vcpu_ids(directory)
        statistics = self._read_statistics(directory, self._table) if self._table else None
        return VmCounters(vcpu_ids, (None,) * len(vcpu_ids), {}, totals, statistics=statistics)

    def _read_statistics(self, directory: Path, table: StatTable) -> VmStatistics:
        def read(descriptors: tuple[StatDescriptor, ...]) -> tuple[int, ...] | None:
            paths = [directory / descriptor.name for descriptor in descriptors]
            return tuple(parse_counter(path.read_text(), str(path)) for path in paths) or None

        return VmStatistics(table, read(table.vm), read(table.vcpu))


def explain_refusal(err: OSError, lockdown: Lockdown, privileges: Privileges) -> SourceUnavailable:
    """Say why the kernel refused to open a counter. Pure.

    Missing rights are EACCES; EPERM is what debugfs_locked_down() in fs/debugfs/file.c answers. Where the mode is not
    known, it still is evidence of lockdown if nothing else restricts this process.
    """
    if err.errno != errno.EPERM:
        remedy = "run as root or give CAP_DAC_READ_SEARCH"
        return SourceUnavailable(f"debugfs may not be read ({err.strerror})", remedy)
    if lockdown.mode == "none":
        reason = f"debugfs: {err.strerror}, although there is no lockdown"
        return SourceUnavailable(reason, "ask who set this host up: a security module or a seccomp filter forbids it")
    if lockdown.mode:
        return SourceUnavailable(CLOSED)
    if privileges.is_unrestricted:
        reason = f"debugfs: {err.strerror} with every capability: the kernel is locked down, in a mode not known"
        return SourceUnavailable(reason)
    reason = f"debugfs: {err.strerror}; perhaps by lockdown, whose mode is not known"
    return SourceUnavailable(reason, "mount securityfs, or give CAP_SYS_ADMIN, to learn whether it is lockdown")
