"""What KVM counts, read by the tests themselves: stats fds of another process, debugfs, uevents."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.live import GuestProcess, GuestVcpu

DEBUGFS = Path("/sys/kernel/debug/kvm")
SYS_PIDFD_GETFD = 438
NETLINK_KOBJECT_UEVENT = 15


class Described(NamedTuple):
    """What a stats fd says of itself: where values begin, and the offset of each statistic behind that, in bytes."""

    data_at: int
    offsets: dict[str, int]


def read_descriptors(fd: int) -> Described:
    """Returns what a stats fd describes (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD)."""
    _flags, name_size, number, _id, descriptors_at, data_at = struct.unpack("<6I", os.pread(fd, 24, 0))
    descriptors = os.pread(fd, number * (16 + name_size), descriptors_at)
    offsets = {}
    for start in range(0, len(descriptors), 16 + name_size):
        name = descriptors[start + 16 : start + 16 + name_size].split(b"\0")[0].decode("ascii")
        offsets[name] = struct.unpack_from("<I", descriptors, start + 8)[0]
    return Described(data_at, offsets)


def read_statistics(fd: int) -> dict[str, int]:
    """Returns the first value of each statistic of a stats fd."""
    data_at, offsets = read_descriptors(fd)
    return {name: struct.unpack("<Q", os.pread(fd, 8, data_at + offset))[0] for name, offset in offsets.items()}


def read_vcpu_statistics(guest: GuestProcess, vcpu: GuestVcpu) -> dict[str, int]:
    """Returns a vCPU's statistics through the stats fd that its VMM holds."""
    with borrow_stats_fd(guest, vcpu) as fd:
        return read_statistics(fd)


def read_offsets(guest: GuestProcess, vcpu: GuestVcpu) -> dict[str, int]:
    """Returns where a vCPU's statistics stand, in bytes behind the first."""
    with borrow_stats_fd(guest, vcpu) as fd:
        return read_descriptors(fd).offsets


@contextmanager
def borrow_stats_fd(guest: GuestProcess, vcpu: GuestVcpu) -> Iterator[int]:
    """Yields a duplicate of the stats fd that a VMM holds for a vCPU."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(guest.pid)
    try:
        fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, vcpu.stats_fd, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd of fd {vcpu.stats_fd} of {guest.pid}")
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        os.close(pidfd)


def find_vm_directory(guest: GuestProcess) -> Path:
    """Returns the VM's directory in debugfs: named after the thread that made the VM and the fd it got."""
    return DEBUGFS / f"{guest.creator_tid}-{guest.vm_fd}"


def read_vm_statistic(guest: GuestProcess, name: str) -> int:
    """Returns the VM's sum of a statistic from debugfs."""
    return int((find_vm_directory(guest) / name).read_text(encoding="ascii"))


@contextmanager
def open_uevents() -> Iterator[socket.socket]:
    """Yields a socket that receives the kernel's uevents."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as uevents:
        uevents.bind((0, 1))
        uevents.settimeout(30)
        yield uevents


def read_kvm_uevent(uevents: socket.socket, event: str, pid: int) -> dict[str, str]:
    """Returns KVM's next uevent of one kind for one creator; TimeoutError when none comes."""
    while True:
        words = uevents.recv(1 << 16).decode().split("\0")
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        if fields.get("EVENT") == event and fields.get("PID") == str(pid):
            return fields
