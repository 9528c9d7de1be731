"""Knows KVM's files among a process's fds, and which of them are one VM.

A VM is known by the files a process holds: ``anon_inode:kvm-vm`` and ``anon_inode:kvm-vcpu:ID`` (virt/kvm/kvm_main.c).
No program can forge these links: what readlink shows of a file with a path begins with a slash.

One VM may be held at several fds (crosvm does), and by several processes: a child that was forked, or one that the fds
were sent to. kcmp(2) tells which are one open file, and puts all files into an order of its own, so that a new one is
found among thousands by a few comparisons.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvm.model import VmKey
from kvm.syscalls import compare_files

# What one process may cost: no VMM comes near these, and a hostile one must not hold up the others.
MAX_FDS = 65536
MAX_VM_FDS = 64

_KVM_LINK = re.compile(r"anon_inode:kvm-(?:(vm)|vcpu:(\d+)|vcpu-stats:(\d+)|(vm-stats))")

# (tid, other_tid, fd, other_fd) -> 0 for one open file, 1 or 2 for the order of two; raises OSError
Compare = Callable[[int, int, int, int], int]


@dataclass(slots=True)
class KvmFiles:
    """The KVM files among a process's fds: VM fds, and vCPU fds and stats fds by vcpu_id; all fds ascend.

    ``vm_stats`` are stats fds of VMs, which QEMU has open only while it answers query-stats.
    """

    vms: list[int] = field(default_factory=list)
    vm_stats: list[int] = field(default_factory=list)
    vcpus: dict[int, list[int]] = field(default_factory=dict)
    stats: dict[int, int] = field(default_factory=dict)


def parse_kvm_links(links: Iterable[tuple[int, str]]) -> KvmFiles:
    """Pick KVM's files from (fd, link) pairs; of several stats fds of one vcpu_id the lowest."""
    files = KvmFiles()
    for fd, link in sorted(links):
        match = _KVM_LINK.fullmatch(link)
        if match is None:
            continue
        if match[1]:
            files.vms.append(fd)
        elif match[2]:
            files.vcpus.setdefault(int(match[2]), []).append(fd)
        elif match[3]:
            files.stats.setdefault(int(match[3]), fd)
        else:
            files.vm_stats.append(fd)
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


def compare_numbers(tid: int, other_tid: int, fd: int, other_fd: int) -> int:
    """Compare fds by their numbers, for kernels without kcmp: then each fd looks like a file of its own."""
    mine, other = (tid, fd), (other_tid, other_fd)
    return 0 if mine == other else 1 if mine < other else 2


def choose_compare() -> Compare:
    """Return kcmp if this kernel has it (CONFIG_KCMP), else the comparison by number."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        compare_files(os.getpid(), os.getpid(), fd, fd)
    except OSError:
        return compare_numbers
    finally:
        os.close(fd)
    return compare_files


def find_distinct(tid: int, fds: Sequence[int], preferred: Sequence[int], compare: Compare) -> list[int]:
    """Return one fd for each open file among a process's fds: a preferred one where there is one, else the lowest.

    Raises OSError.
    """
    distinct: list[int] = []
    for fd in [*(fd for fd in preferred if fd in fds), *fds]:
        if not any(fd == known or compare(tid, tid, known, fd) == 0 for known in distinct):
            distinct.append(fd)
    return sorted(distinct)


def holds_several_vms(tid: int, files: KvmFiles, compare: Compare) -> bool:
    """Tell whether two vCPUs of one vcpu_id are different files: a VM has each id once. Raises OSError."""
    return any(
        compare(tid, tid, fds[0], fd) != 0 for fds in files.vcpus.values() for fd in fds[1:] if len(fds) <= MAX_VM_FDS
    ) or any(len(fds) > MAX_VM_FDS for fds in files.vcpus.values())


class VmHolders:
    """Remembers which process holds each VM's file, in kcmp's order, so that a VM is counted once."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._holders: list[tuple[int, int, VmKey]] = []

    def claim(self, tid: int, fd: int, key: VmKey) -> tuple[VmKey, VmKey | None]:
        """Return whose VM is at this fd of a process: of those that hold it, the one that started first.

        The second key is of the process that was taken for its owner until now, if that was another one. Raises OSError
        where the fd cannot be compared, for want of rights or because it is closed.
        """
        self._compare(tid, tid, fd, fd)
        low, high = 0, len(self._holders)
        while low < high:
            middle = (low + high) // 2
            other_tid, other_fd, other = self._holders[middle]
            try:
                order = self._compare(tid, other_tid, fd, other_fd)
            except OSError:  # that one is gone: begin anew without it
                del self._holders[middle]
                low, high = 0, len(self._holders)
                continue
            if order == 0:
                if (key.start_ticks, key.pid) >= (other.start_ticks, other.pid):
                    return other, None
                self._holders[middle] = (tid, fd, key)
                return key, other
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        self._holders.insert(low, (tid, fd, key))
        return key, None

    def forget(self, pid: int) -> None:
        """Forget what a process held."""
        self._holders = [holder for holder in self._holders if holder[2].pid != pid]
