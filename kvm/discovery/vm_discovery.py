"""Finds the processes that hold VMs, and says which of their fds are vCPUs.

What it costs is bounded. Reading the link of every fd of a host is what takes time (207,000 fds: half a second), so it
is done once a process, and again only when the *listing* of its fds or threads has changed. Listings are read on
every snapshot for processes younger than ``YOUNG_SECONDS`` (KVM's uevent comes before the VM has vCPUs), every
``VMM_SECONDS`` for those that hold VMs (hot-plug sends no event), every ``OTHER_SECONDS`` for the rest, and at once
when KVM's uevent names the process. Once the first snapshot is done, none is begun after ``SCAN_BUDGET_SECONDS``, and
none gets more than a hundredth of the time: one that was slow to scan is left alone for a hundred times as long. Half
of that budget is for processes that a uevent has named of late, so that a new VM is found at once among thousands of
new processes, and whoever makes VMs by the thousand leaves time for everybody else.

Each process with a VM is held by a pidfd: that pins nothing of the VM, and says for ever that the process is the same
one, and at once that it has ended. A thread-group leader may exit while the VM runs on: then /proc/PID/fd is empty, and
everything is read through a living thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvm.discovery.kvm_fds import (
    MAX_FDS,
    MAX_VM_FDS,
    Compare,
    KvmFiles,
    VmHolders,
    choose_compare,
    find_distinct,
    holds_several_vms,
    read_kvm_files,
)
from kvm.discovery.processes import find_living_thread, open_pidfd, read_stat
from kvm.discovery.uevents import parse_uevent
from kvm.errors import MalformedData
from kvm.model import VmKey

YOUNG_SECONDS = 30.0
VMM_SECONDS = 30.0
OTHER_SECONDS = 300.0
SCAN_BUDGET_SECONDS = 0.02
REST_FACTOR = 100.0


@dataclass(frozen=True, slots=True)
class HeldVm:
    """One VM as the files of its process show it.

    ``tid`` is a living thread of the process and ``pidfd`` refers to it (borrowed: Discovery closes it; -1 where there
    is none). ``vcpu_ids`` ascend; they are None where the process holds several VMs, because its files do not tell
    which vCPU is whose. ``stats_fds`` maps vcpu_id to the number, in that process, of a binary stats fd;
    ``vm_stats_fd`` is that of the VM itself, None where there is none.
    """

    key: VmKey
    tid: int
    pidfd: int
    vcpu_ids: tuple[int, ...] | None
    stats_fds: Mapping[int, int]
    vm_stats_fd: int | None = None


@dataclass(slots=True)
class _Process:
    """What is known of a process. ``not_own`` are VM fds that are another process's VM: a forked child's, say."""

    inode: int
    first_seen: float
    named_at: float = float("-inf")
    scanned_at: float = float("-inf")
    scan_seconds: float = 0.0
    listing: int = 0
    start_ticks: int = 0
    tid: int = 0
    pidfd: int = -1
    not_own: set[int] = field(default_factory=set)
    vms: tuple[HeldVm, ...] = ()
    vms_left_out: int = 0


class Discovery:
    """Keeps the list of the host's VMs, and renews it at a bounded cost.

    ``proc`` is where proc is mounted; ``clock`` gives seconds that only grow; ``uevents`` reads waiting uevents, one
    message a call, b"" when there are none; ``compare`` stands in for kcmp. ``on_error`` is told what cannot be read:
    (pid, kind, message), pid 0 for what concerns no single process.
    """

    def __init__(
        self,
        proc: Path,
        on_error: Callable[[int, str, str], None],
        clock: Callable[[], float] = time.monotonic,
        uevents: Callable[[], bytes] = lambda: b"",
        compare: Compare | None = None,
    ) -> None:
        self._proc = proc
        self._on_error = on_error
        self._clock = clock
        self._uevents = uevents
        self._compare = compare or choose_compare()
        self._processes: dict[int, _Process] = {}
        self._by_pidfd: dict[int, int] = {}
        self._ended = select.poll()
        self._owners = VmHolders(self._compare)
        self._started = False
        self._own_pid = os.getpid()
        self._refused: set[int] = set()
        self.sees_first_process: bool | None = None
        """Whether process 1 was among those listed: where it is hidden (hidepid), so may others be; None before."""

    def find_vms(self) -> list[HeldVm]:
        """Renew the list and return it."""
        now = self._clock()
        self._renew_list(now)
        self._take_uevents(now)
        budget = SCAN_BUDGET_SECONDS if self._started else float("inf")
        named = [item for item in self._processes.items() if now - item[1].named_at < YOUNG_SECONDS]
        begun = self._clock()  # to list the processes has taken time, too: 20 ms for 12,000
        self._scan(named, now, begun + budget / 2)
        scanned = {pid for pid, process in named if process.scanned_at == now}
        rest = [item for item in self._processes.items() if item[0] not in scanned]
        self._scan(rest, now, begun + budget)
        self._started = True
        return [vm for process in self._processes.values() for vm in process.vms]

    def _scan(self, processes: Iterable[tuple[int, _Process]], now: float, deadline: float) -> None:
        # Those not scanned for longest come first, so that a small budget still reaches everybody in turn.
        for pid, process in sorted(processes, key=lambda item: item[1].scanned_at):
            if self._clock() > deadline:
                break
            if self._is_due(process, now):
                self._scan_one(pid, process, now)

    def scan_again(self, pids: Iterable[int]) -> list[HeldVm]:
        """Scan these processes at once, because they were not as described; return the VMs that they hold."""
        now = self._clock()
        self._forget_ended()
        wanted = set(pids)
        for pid in wanted & self._processes.keys():
            process = self._processes[pid]
            process.listing, process.first_seen = 0, now
            self._scan_one(pid, process, now)
        return [vm for pid in wanted & self._processes.keys() for vm in self._processes[pid].vms]

    @property
    def vms_left_out(self) -> int:
        """How many VM fds of processes that hold more than MAX_VM_FDS were not scanned."""
        return sum(process.vms_left_out for process in self._processes.values())

    @property
    def refused(self) -> frozenset[int]:
        """The processes whose fds may not be read, for want of CAP_SYS_PTRACE or by a security module's will."""
        return frozenset(self._refused)

    def close(self) -> None:
        """Close every pidfd."""
        for pid in list(self._processes):
            self._forget(pid)

    def _renew_list(self, now: float) -> None:
        self._forget_ended()
        with os.scandir(self._proc) as entries:
            # A process's directory has an inode of its own for as long as the process lives, or for less.
            inodes = {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}
        self.sees_first_process = 1 in inodes
        inodes.pop(self._own_pid, None)
        for pid in self._processes.keys() - inodes.keys():
            self._forget(pid)
        for pid, inode in inodes.items():
            process = self._processes.get(pid)
            if process is not None and process.inode != inode and process.pidfd < 0:
                self._forget(pid)  # another process has its number now; one with a pidfd would have been seen to end
                process = None
            if process is None:
                self._processes[pid] = _Process(inode, first_seen=now)
            else:
                process.inode = inode

    def _forget_ended(self) -> None:
        for pidfd, _events in self._ended.poll(0):
            self._forget(self._by_pidfd[pidfd])

    def _forget(self, pid: int) -> None:
        process = self._processes.pop(pid)
        self._refused.discard(pid)
        if process.vms:
            self._owners.forget(pid)
        self._release(process)

    def _release(self, process: _Process) -> None:
        if process.pidfd >= 0:
            self._ended.unregister(process.pidfd)
            del self._by_pidfd[process.pidfd]
            os.close(process.pidfd)
            process.pidfd = -1

    def _take_uevents(self, now: float) -> None:
        while message := self._uevents():
            tid = parse_uevent(message)
            if tid is None:
                continue
            with contextlib.suppress(OSError):  # a thread that is gone already holds no VM
                status = (self._proc / str(tid) / "status").read_text(errors="replace")
                leader = re.search(r"^Tgid:\s*(\d{1,10})$", status, re.MULTILINE)
                if leader and int(leader[1]) in self._processes:
                    process = self._processes[int(leader[1])]
                    process.first_seen = process.named_at = now

    def _is_due(self, process: _Process, now: float) -> bool:
        waited = now - process.scanned_at
        if waited < process.scan_seconds * REST_FACTOR:
            return False
        if process.listing == 0 or now - process.first_seen < YOUNG_SECONDS:
            return True
        return waited >= (VMM_SECONDS if process.vms else OTHER_SECONDS)

    def _scan_one(self, pid: int, process: _Process, now: float) -> None:
        process.scanned_at = now
        started = self._clock()
        try:
            self._renew(pid, process)
            self._refused.discard(pid)
        except PermissionError:
            process.listing = 0
            self._refused.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            self._forget(pid)
        except (OSError, MalformedData) as err:
            process.listing = 0  # so that it is due again
            self._tell(pid, err)
        process.scan_seconds = self._clock() - started

    def _tell(self, pid: int, err: OSError | MalformedData) -> None:
        if isinstance(err, OSError) and err.errno == errno.EBADF:
            return  # it has just closed that fd, or is ending: the next snapshot tells
        if isinstance(err, OSError) and err.errno in (errno.EMFILE, errno.ENFILE):
            self._on_error(0, "fds", f"{err.strerror}: raise LimitNOFILE")
        else:
            self._on_error(pid, "unreadable", f"cannot read its fds: {err}")

    def _renew(self, pid: int, process: _Process) -> None:
        tid = find_living_thread(self._proc, pid)
        threads = f"{self._proc}/{pid}/task"
        # Below an open directory a link is read twice as fast as by its whole path.
        fd_directory = os.open(f"{threads}/{tid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fds = os.listdir(fd_directory)
            listing = hash((tuple(fds), tuple(os.listdir(threads)), tid)) or 1
            if listing == process.listing:
                return
            if len(fds) > MAX_FDS:
                self._on_error(pid, "too_many_fds", f"it has {len(fds)} fds: only {MAX_FDS} are scanned")
            files = read_kvm_files(fd_directory, fds[:MAX_FDS])
        finally:
            os.close(fd_directory)
        if files.vms or files.vcpus:
            self._hold(pid, tid, process)
            process.vms = self._find_own_vms(pid, process, files)
        else:
            process.vms = ()
        process.listing = listing  # last: what failed on the way is scanned again

    def _hold(self, pid: int, tid: int, process: _Process) -> None:
        start_ticks = read_stat(self._proc, pid).start_ticks
        if process.pidfd >= 0 and process.tid == tid:
            return
        self._release(process)
        process.start_ticks, process.tid = start_ticks, tid
        try:
            pidfd = open_pidfd(pid, tid)
        except OSError as err:
            if tid == pid or err.errno != errno.EINVAL:
                raise
            self._on_error(
                pid, "pidfd", "its leader thread has exited, and this kernel has no PIDFD_THREAD (Linux 6.9)"
            )
            return
        process.pidfd, self._by_pidfd[pidfd] = pidfd, pid
        self._ended.register(pidfd, select.POLLIN)
        if read_stat(self._proc, pid).start_ticks != start_ticks:
            raise ProcessLookupError(pid)  # the number passed to another process in between

    def _find_own_vms(self, pid: int, process: _Process, files: KvmFiles) -> tuple[HeldVm, ...]:
        process.vms_left_out = max(0, len(files.vms) - MAX_VM_FDS)
        if process.vms_left_out:
            self._on_error(pid, "too_many_vms", f"it has {len(files.vms)} VM fds: only {MAX_VM_FDS} are scanned")
        known = [vm.key.vm_fd for vm in process.vms]
        vm_fds = find_distinct(process.tid, files.vms[:MAX_VM_FDS], known, self._compare)
        several = len(vm_fds) > 1 or holds_several_vms(process.tid, files, self._compare)
        if several:
            self._on_error(pid, "several_vms", "it holds several VMs; its files do not tell whose their vCPUs are")
        process.not_own &= set(files.vms)
        self._owners.forget(pid)  # its fds may be others by now; what it still has it claims anew
        first_vcpu = min((fds[0] for fds in files.vcpus.values()), default=-1)
        vms = []
        for vm_fd in vm_fds or [-1]:
            key = VmKey(pid, process.start_ticks, vm_fd)
            if not self._is_own(process, key, vm_fd if vm_fd >= 0 else first_vcpu):
                continue
            if several:
                vms.append(HeldVm(key, process.tid, process.pidfd, None, {}))
                continue
            vm_stats_fd = files.vm_stats[0] if files.vm_stats else None
            ids = tuple(sorted(files.vcpus))
            vms.append(HeldVm(key, process.tid, process.pidfd, ids, files.stats, vm_stats_fd))
        return tuple(vms)

    def _is_own(self, process: _Process, key: VmKey, fd: int) -> bool:
        """Tell whether a VM is this process's own; one that was another's stays so, as it cannot run here (EIO)."""
        if fd in process.not_own:
            return False
        owner, displaced = self._owners.claim(process.tid, fd, key)
        if owner != key:
            process.not_own.add(fd)
            return False
        other = self._processes.get(displaced.pid) if displaced is not None else None
        if other is not None and displaced is not None:  # a younger process was seen with it first
            other.not_own.add(displaced.vm_fd)
            other.vms = tuple(vm for vm in other.vms if vm.key != displaced)
        return True
