"""Finds the processes that hold VMs, and says which of their fds are vCPUs.

A VM is known by the files a process holds: ``anon_inode:kvm-vm`` and ``anon_inode:kvm-vcpu:ID`` (virt/kvm/kvm_main.c).
No program can forge these links: what readlink shows of a file with a path begins with a slash.

What it costs is bounded. Reading the link of every fd of a host is what takes time (207,000 fds: half a second), so it
is done once a process, and again only when the *listing* of its fds or threads has changed. Listings are looked at
on every look for processes younger than ``YOUNG_SECONDS`` (KVM's uevent comes before the VM has vCPUs), every
``VMM_SECONDS`` for those that hold VMs (hot-plug sends no event), every ``OTHER_SECONDS`` for the rest, and at once
when KVM's uevent names the process; never for longer than ``LOOK_BUDGET_SECONDS`` a look once the first is done.

Each process with a VM is held by a pidfd: that pins nothing of the VM, and says for ever that the process is the same
one. A thread-group leader may have exited while the VM runs on: then /proc/PID/fd is empty, and everything is read
through a living thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kvm import abi, syscalls
from kvm.model import MalformedData, VmKey
from kvm.uevents import parse_uevent

log = logging.getLogger(__name__)

YOUNG_SECONDS = 30.0
VMM_SECONDS = 30.0
OTHER_SECONDS = 300.0
LOOK_BUDGET_SECONDS = 0.02

_KVM_LINK = re.compile(r"anon_inode:kvm-(?:(vm)|vcpu:(\d+)|vcpu-stats:(\d+))")


@dataclass(frozen=True, slots=True)
class HeldVm:
    """One VM as the files of its process show it.

    ``tid`` is a living thread of the process and ``pidfd`` refers to it (borrowed: Discovery closes it). ``vcpu_ids``
    ascend; they are None where the process holds several VMs, because its files do not tell which vCPU is whose.
    ``stats_fds`` maps vcpu_id to the number, in that process, of a binary statistics fd.
    """

    key: VmKey
    tid: int
    pidfd: int
    vcpu_ids: tuple[int, ...] | None
    stats_fds: Mapping[int, int]


@dataclass(slots=True)
class KvmFiles:
    """The KVM files among a process's fds: VM fds, vCPU fds and statistics fds by vcpu_id, lowest fd first."""

    vms: list[int] = field(default_factory=list)
    vcpus: dict[int, int] = field(default_factory=dict)
    stats: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Process:
    first_seen: float
    looked_at: float = -1.0
    listing: int = 0
    start_ticks: int = 0
    tid: int = 0
    pidfd: int = -1
    parent_pid: int = 0
    inherited: dict[tuple[int, int], bool] = field(default_factory=dict)
    vms: tuple[HeldVm, ...] = ()


class ProcessStat(NamedTuple):
    """Fields 3, 4 and 22 of a /proc/PID/stat."""

    state: str
    parent_pid: int
    start_ticks: int


def parse_stat(text: str, origin: str) -> ProcessStat:
    """Parse a /proc/PID/stat; raises MalformedData.

    A thread may be called ``) R 1 (``: the fields are counted from the last parenthesis.
    """
    fields = text.rpartition(")")[2].split()
    try:
        return ProcessStat(fields[0], int(fields[1]), int(fields[19]))
    except (IndexError, ValueError) as err:
        raise MalformedData(origin, f"no start time in {text[:80]!r}") from err


def read_stat(proc: Path, pid: int) -> ProcessStat:
    """Read what a process is; raises OSError or MalformedData."""
    path = proc / str(pid) / "stat"
    return parse_stat(path.read_text(errors="replace"), str(path))


def parse_kvm_links(links: Iterable[tuple[int, str]]) -> KvmFiles:
    """Pick KVM's files from (fd, link) pairs."""
    files = KvmFiles()
    for fd, link in sorted(links):
        match = _KVM_LINK.fullmatch(link)
        if match is None:
            continue
        if match[1]:
            files.vms.append(fd)
        elif match[2]:
            files.vcpus.setdefault(int(match[2]), fd)
        else:
            files.stats.setdefault(int(match[3]), fd)
    return files


def read_kvm_files(fd_directory: int, fds: Iterable[str]) -> KvmFiles:
    """Read the links of these fds in an open /proc/PID/fd, and pick KVM's; an fd closed meanwhile is none."""
    links = []
    for fd in fds:
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(fd, dir_fd=fd_directory)
            if link.startswith("anon_inode:kvm-"):
                links.append((int(fd), link))
    return parse_kvm_links(links)


def find_living_thread(proc: Path, pid: int) -> int:
    """Return the leader, or where it has exited another thread of the process that still has its files.

    Raises FileNotFoundError where none is left.
    """
    if read_stat(proc, pid).state not in "ZX":
        return pid
    for tid in sorted(os.listdir(proc / str(pid) / "task"), key=int):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if parse_stat((proc / str(pid) / "task" / tid / "stat").read_text(errors="replace"), tid).state not in "ZX":
                return int(tid)
    raise FileNotFoundError(pid)


def open_pidfd(pid: int, tid: int) -> int:
    """Return a pidfd through which the process's files can be had; raises OSError.

    Where the leader has exited that takes a pidfd of a thread: Linux kernel commit 64bef697d33b "pidfd: implement
    PIDFD_THREAD flag for pidfd_open()" (in v6.9); before, OSError with EINVAL.
    """
    return os.pidfd_open(pid) if tid == pid else os.pidfd_open(tid, abi.PIDFD_THREAD)


class Discovery:
    """Keeps the list of the host's VMs, and renews it at a bounded cost.

    ``proc`` is where proc is mounted; ``clock`` gives seconds that only grow; ``uevents`` reads waiting uevents, one
    message a call, b"" when there are none. ``on_error`` is told of what cannot be read: (pid, kind, message).
    """

    def __init__(
        self,
        proc: Path,
        on_error: Callable[[int, str, str], None],
        clock: Callable[[], float] = time.monotonic,
        uevents: Callable[[], bytes] = lambda: b"",
    ) -> None:
        self._proc = proc
        self._on_error = on_error
        self._clock = clock
        self._uevents = uevents
        self._processes: dict[int, _Process] = {}
        self._started = False
        self._own_pid = os.getpid()
        self._refused: set[int] = set()

    def find_vms(self) -> list[HeldVm]:
        """Renew the list and return it."""
        now = self._clock()
        self._forget_gone({int(name) for name in os.listdir(self._proc) if name.isdigit()}, now)
        self._take_uevents(now)
        deadline = now + LOOK_BUDGET_SECONDS if self._started else float("inf")
        # Those not looked at for longest come first, so that a small budget still reaches everybody in turn.
        for pid, process in sorted(self._processes.items(), key=lambda item: item[1].looked_at):
            if self._is_due(process, now):
                self._look_at(pid, process, now)
                if self._clock() > deadline and process.looked_at >= 0:
                    break
        self._started = True
        return [
            vm for process in self._processes.values() for vm in process.vms if not self._is_inherited(process, vm.key)
        ]

    @property
    def refused(self) -> frozenset[int]:
        """The processes that may not be looked at, for want of CAP_SYS_PTRACE or by a security module's will."""
        return frozenset(self._refused)

    def close(self) -> None:
        """Close every pidfd."""
        for pid in list(self._processes):
            self._forget(pid)

    def _is_inherited(self, process: _Process, key: VmKey) -> bool:
        """Tell whether a VM is its parent process's: a VMM that has forked leaves its fds to its child."""
        parent = self._processes.get(process.parent_pid)
        if parent is None or not parent.vms or key.vm_fd < 0:
            return False
        for theirs in parent.vms:
            pair = (theirs.key.vm_fd, key.vm_fd)
            if pair not in process.inherited:
                with contextlib.suppress(OSError):  # one of them has just ended: the next look tells
                    process.inherited[pair] = syscalls.same_file(parent.tid, pair[0], process.tid, pair[1])
            if process.inherited.get(pair):
                return True
        return False

    def _forget_gone(self, pids: set[int], now: float) -> None:
        for pid in self._processes.keys() - pids:
            self._forget(pid)
        for pid in pids - self._processes.keys() - {self._own_pid}:
            self._processes[pid] = _Process(first_seen=now)

    def _forget(self, pid: int) -> None:
        process = self._processes.pop(pid)
        self._refused.discard(pid)
        if process.pidfd >= 0:
            os.close(process.pidfd)

    def _take_uevents(self, now: float) -> None:
        while message := self._uevents():
            tid = parse_uevent(message)
            if tid is None:
                continue
            with contextlib.suppress(OSError, ValueError):  # a thread that is gone already holds no VM
                status = (self._proc / str(tid) / "status").read_text(errors="replace")
                pid = int(re.search(r"^Tgid:\s*(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
                if pid in self._processes:
                    self._processes[pid].first_seen = now

    def _is_due(self, process: _Process, now: float) -> bool:
        if now - process.first_seen < YOUNG_SECONDS:
            return True
        return now - process.looked_at >= (VMM_SECONDS if process.vms else OTHER_SECONDS)

    def _look_at(self, pid: int, process: _Process, now: float) -> None:
        process.looked_at = now
        try:
            self._renew(pid, process)
            self._refused.discard(pid)
        except PermissionError:
            self._refused.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            self._forget(pid)
        except (OSError, MalformedData) as err:
            process.vms = ()
            self._on_error(pid, "unreadable", f"cannot look at its fds: {err}")

    def _renew(self, pid: int, process: _Process) -> None:
        tid = find_living_thread(self._proc, pid)
        threads = f"{self._proc}/{pid}/task"
        # Below an open directory a link is read twice as fast as by its whole path.
        fd_directory = os.open(f"{threads}/{tid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fds = os.listdir(fd_directory)
            listing = hash((tuple(fds), tuple(os.listdir(threads)), tid))
            if listing == process.listing:
                return
            files = read_kvm_files(fd_directory, fds)
        finally:
            os.close(fd_directory)
        process.listing = listing
        if not files.vms and not files.vcpus:
            process.vms = ()
            return
        self._hold(pid, tid, process)
        process.vms = self._tell_vms_apart(pid, process, files)

    def _hold(self, pid: int, tid: int, process: _Process) -> None:
        _state, process.parent_pid, start_ticks = read_stat(self._proc, pid)
        if process.pidfd >= 0 and (process.start_ticks, process.tid) == (start_ticks, tid):
            return
        if process.pidfd >= 0:
            os.close(process.pidfd)
            process.pidfd = -1
        process.start_ticks, process.tid, process.inherited = start_ticks, tid, {}
        try:
            process.pidfd = open_pidfd(pid, tid)
        except OSError as err:
            self._on_error(pid, "pidfd", f"no pidfd for it (its leader thread has exited): {err}")
            return
        if read_stat(self._proc, pid).start_ticks != start_ticks:
            raise ProcessLookupError(pid)

    def _tell_vms_apart(self, pid: int, process: _Process, files: KvmFiles) -> tuple[HeldVm, ...]:
        vm_fds: list[int] = []
        for fd in files.vms:  # a VMM may hold one VM at several fds: crosvm does
            if not any(syscalls.same_file(process.tid, known, process.tid, fd) for known in vm_fds):
                vm_fds.append(fd)
        if len(vm_fds) > 1:
            self._on_error(pid, "several_vms", "it holds several VMs; its files do not tell whose their vCPUs are")
            return tuple(
                HeldVm(VmKey(pid, process.start_ticks, fd), process.tid, process.pidfd, None, {}) for fd in vm_fds
            )
        key = VmKey(pid, process.start_ticks, vm_fds[0] if vm_fds else -1)
        return (HeldVm(key, process.tid, process.pidfd, tuple(sorted(files.vcpus)), files.stats),)
