"""A VM of our own with one vCPU that never runs: it describes the running kernel, and is thrown away at once.

From its statistics fd come the names and places of this kernel's statistics, which are those of the raw ``struct
kvm_vcpu_stat`` in kernel memory too. Its file descriptors show the BPF programs what KVM's files look like.

It costs some milliseconds, and KVM tells the host of it by a uevent like of any other VM. Where it is the host's first
VM, KVM switches the virtualisation hardware on for it, and off again after it.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from kvm import abi
from kvm.binary_stats import decode_descriptors, decode_header
from kvm.model import Statistic


class ThrowawayVm:
    """The VM; to be used with ``with``. Entering raises OSError (no KVM, no access) or MalformedData.

    ``vm_fd``, ``vcpu_fd`` and ``stats_fd`` (of the vCPU) are fds of this process, ``statistics`` the kernel's
    descriptors of a vCPU by name.
    """

    def __init__(self, device: Path = Path("/dev/kvm")) -> None:
        self._device = device
        self._stack = ExitStack()
        self.vm_fd = -1
        self.vcpu_fd = -1
        self.stats_fd = -1
        self.statistics: dict[str, Statistic] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            device = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, device)
            self.vm_fd = self._own(stack, fcntl.ioctl(device, abi.KVM_CREATE_VM, 0))
            self.vcpu_fd = self._own(stack, fcntl.ioctl(self.vm_fd, abi.KVM_CREATE_VCPU, 0))
            self.stats_fd = self._own(stack, fcntl.ioctl(self.vcpu_fd, abi.KVM_GET_STATS_FD, 0))
            self.statistics = read_descriptors(self.stats_fd)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _own(self, stack: ExitStack, fd: int) -> int:
        stack.callback(os.close, fd)
        return fd


def read_descriptors(stats_fd: int) -> dict[str, Statistic]:
    """Read the descriptors of a statistics fd; raises OSError or MalformedData."""
    origin = "statistics of our own vCPU"
    header = decode_header(os.pread(stats_fd, abi.KVM_STATS_HEADER.size, 0), origin)
    return decode_descriptors(header, os.pread(stats_fd, header.desc_bytes, header.desc_offset), origin)
