"""A VM of our own whose vCPU never enters a guest: it describes the running kernel, and is thrown away at once.

From its stats fds come the names and places of this kernel's statistics, which are those of the raw ``struct
kvm_vcpu_stat`` and ``struct kvm_vm_stat`` in kernel memory too. Its file descriptors show the BPF programs what KVM's
files look like, and what was done with it shows whether they read KVM's memory right: its vCPU has a number that
nothing else has, its notify exits are armed where the host can do that, and `run` counts without running anything.

It costs some milliseconds, and KVM tells the host of it by a uevent like of any other VM. Where it is the host's first
VM, KVM switches the virtualisation hardware on for it, and off again after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from kvm import abi
from kvm.binary_stats import Statistic, decode_descriptors, decode_header, decode_values, measure_values
from kvm.errors import MalformedData

# Numbers that are unlikely to be found by chance where they are looked for.
VCPU_ID = 173
NOTIFY_WINDOW_CYCLES = 0x5EED_C1C
# A value for each register of struct kvm_regs but the last one, rflags, of which bit 1 is always set.
REGISTERS = tuple(0x6B76_6D00_0000 + number for number in range(17))
_RFLAGS = 0x2
_ORIGIN = "statistics of our own VM"


class ThrowawayVm:
    """The VM; to be used with ``with``. Entering raises OSError (no KVM, no access) or MalformedData.

    ``vm_fd``, ``vcpu_fd``, ``stats_fd`` (of the vCPU) and ``vm_stats_fd`` are fds of this process, ``statistics`` and
    ``vm_statistics`` the kernel's descriptors of a vCPU and of a VM by name. ``notify`` is the window and the flags
    that KVM keeps of its notify exits.
    """

    def __init__(self, device: Path = Path("/dev/kvm")) -> None:
        self._device = device
        self._stack = ExitStack()
        self.vm_fd = -1
        self.vcpu_fd = -1
        self.stats_fd = self.vm_stats_fd = -1
        self.notify = (0, 0)
        self.statistics: dict[str, Statistic] = {}
        self.vm_statistics: dict[str, Statistic] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            device = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, device)
            self.vm_fd = self._own(stack, fcntl.ioctl(device, abi.KVM_CREATE_VM, 0))
            self.notify = self._arm()  # KVM allows that before the first vCPU only
            self.vcpu_fd = self._own(stack, fcntl.ioctl(self.vm_fd, abi.KVM_CREATE_VCPU, VCPU_ID))
            self.stats_fd = self._own(stack, fcntl.ioctl(self.vcpu_fd, abi.KVM_GET_STATS_FD, 0))
            self.vm_stats_fd = self._own(stack, fcntl.ioctl(self.vm_fd, abi.KVM_GET_STATS_FD, 0))
            self.statistics = read_descriptors(self.stats_fd)
            self.vm_statistics = read_descriptors(self.vm_stats_fd)
            run_bytes = fcntl.ioctl(device, abi.KVM_GET_VCPU_MMAP_SIZE, 0)
            self._run_page = stack.enter_context(mmap.mmap(self.vcpu_fd, run_bytes))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, times: int) -> None:
        """Enter KVM_RUN so often, in this thread, and leave it at once each time; raises OSError.

        With immediate_exit KVM does all that it does before and after a guest runs, and counts it, but for the guest.
        """
        self._run_page[abi.KVM_RUN_IMMEDIATE_EXIT] = 1
        for _ in range(times):
            with contextlib.suppress(InterruptedError):
                fcntl.ioctl(self.vcpu_fd, abi.KVM_RUN, 0)

    def write_registers(self) -> None:
        """Give the vCPU the registers REGISTERS; raises OSError."""
        fcntl.ioctl(self.vcpu_fd, abi.KVM_SET_REGS, abi.KVM_REGS.pack(*REGISTERS, _RFLAGS))

    def read_statistics(self) -> dict[str, tuple[int, ...]]:
        """Read all statistics of the vCPU by its stats fd; raises OSError or MalformedData."""
        return read_values(self.stats_fd, self.statistics)

    def read_vm_statistics(self) -> dict[str, tuple[int, ...]]:
        """Read all statistics of the VM by its stats fd; raises OSError or MalformedData."""
        return read_values(self.vm_stats_fd, self.vm_statistics)

    def _arm(self) -> tuple[int, int]:
        flags = abi.NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_ENABLED
        argument = abi.KVM_ENABLE_CAP_ARGUMENT.pack(
            abi.KVM_CAP_X86_NOTIFY_VMEXIT, 0, NOTIFY_WINDOW_CYCLES << 32 | flags
        )
        try:
            fcntl.ioctl(self.vm_fd, abi.KVM_ENABLE_CAP, argument)
        except OSError:
            return 0, 0  # this host cannot do it, and KVM has noted nothing
        return NOTIFY_WINDOW_CYCLES, flags

    def _own(self, stack: ExitStack, fd: int) -> int:
        stack.callback(os.close, fd)
        return fd


def read_descriptors(stats_fd: int) -> dict[str, Statistic]:
    """Read the descriptors of a stats fd; raises OSError or MalformedData."""
    header = decode_header(os.pread(stats_fd, abi.KVM_STATS_HEADER.size, 0), _ORIGIN)
    return decode_descriptors(header, os.pread(stats_fd, header.desc_bytes, header.desc_offset), _ORIGIN)


def read_values(stats_fd: int, statistics: Mapping[str, Statistic]) -> dict[str, tuple[int, ...]]:
    """Read the values that these descriptors describe from a stats fd; raises OSError or MalformedData."""
    header = decode_header(os.pread(stats_fd, abi.KVM_STATS_HEADER.size, 0), _ORIGIN)
    length = measure_values(statistics.values())
    block = os.pread(stats_fd, length, header.data_offset)
    if len(block) < length:
        raise MalformedData(_ORIGIN, f"{len(block)} bytes of values, {length} expected")
    return decode_values(statistics, block)
