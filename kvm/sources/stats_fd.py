"""Reads the binary statistics fds that a VMM holds: every vCPU of QEMU 8.1 and later.

On every look each fd is duplicated (pidfd_getfd), read (pread) and closed at once, because a duplicate keeps the whole
VM alive: vCPUs, its debugfs directory, the kvm module. On older kernels it does not even do that, and reading after the
VM's end is a use after free. Linux kernel commit eed3013faa40 "KVM: Grab a reference to KVM for VM and vCPU stats file
descriptors" (in v6.5 and stable trees) brought ``kvm_vcpu_stats_release``: without that name in /proc/kallsyms this
source refuses to work.

Only pread: a duplicate shares its file offset with the VMM. What was borrowed is recognised by its link on every look:
an fd number may hold another file by now, and a VMM that is not honest could put a forged one there.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvm import abi, statistics, syscalls
from kvm.discovery import HeldVm
from kvm.model import MalformedData, SourceUnavailable, VmCounters, VmGone, VmKey

_SAFE_SYMBOL = b" kvm_vcpu_stats_release"


@dataclass(frozen=True, slots=True)
class CounterLayout:
    """Where the wanted counters stand in a statistics file: one pread of ``length`` bytes at ``offset`` has them."""

    names: tuple[str, ...]
    offset: int
    length: int
    values: struct.Struct


def plan_layout(header: statistics.StatsHeader, offsets: Mapping[str, int]) -> CounterLayout:
    """Plan one read for counters at these offsets in bytes within the data block; there must be at least one."""
    names = tuple(sorted(offsets, key=lambda name: offsets[name]))
    first, format_, at = offsets[names[0]], "=", offsets[names[0]]
    for name in names:
        format_ += f"{offsets[name] - at}xQ"
        at = offsets[name] + statistics.VALUE_BYTES
    return CounterLayout(names, header.data_offset + first, at - first, struct.Struct(format_))


def read_layout(fd: int, wanted: Iterable[str], origin: str) -> CounterLayout:
    """Read the descriptors of a statistics file of vCPU; raises OSError or MalformedData."""
    header = statistics.decode_header(os.pread(fd, abi.KVM_STATS_HEADER.size, 0), origin)
    block = os.pread(fd, header.desc_bytes, header.desc_offset)
    offsets = statistics.find_counters(statistics.decode_descriptors(header, block, origin), wanted)
    if not offsets:
        raise MalformedData(origin, "this kernel describes none of the wanted statistics")
    return plan_layout(header, offsets)


def read_safe_to_borrow(kallsyms: Path) -> bool:
    """Tell whether this kernel keeps a VM alive while a duplicate of its statistics fd is read; raises OSError."""
    with kallsyms.open("rb") as lines:
        return any(_SAFE_SYMBOL in line for line in lines)


class StatsFdSource:
    """The CounterSource ``stats_fd``. ``wanted`` names the counters; ``on_error`` takes (pid, kind, message)."""

    name = "stats_fd"
    finds_vms = False

    def __init__(
        self, wanted: Sequence[str], on_error: Callable[[int, str, str], None], kallsyms: Path = Path("/proc/kallsyms")
    ) -> None:
        self._wanted = tuple(wanted)
        self._on_error = on_error
        self._kallsyms = kallsyms
        self._layouts: dict[VmKey, CounterLayout] = {}

    def open(self) -> None:
        """Check that borrowing is safe on this kernel; raises SourceUnavailable."""
        try:
            safe = read_safe_to_borrow(self._kallsyms)
        except OSError as err:
            raise SourceUnavailable(
                f"{self._kallsyms} cannot be read ({err.strerror}), so it is not known whether reading is safe"
            ) from err
        if not safe:
            raise SourceUnavailable(
                "reading is unsafe on this kernel: it has no kvm_vcpu_stats_release",
                "use Linux 6.5, 6.4.8, 6.1.43, 5.15.124 or later",
            )

    def read(self, vms: Sequence[HeldVm]) -> dict[VmKey, VmCounters]:
        """Read these VMs; one whose process has ended has no entry, one without statistics fds says so."""
        readings = {}
        for vm in vms:
            try:
                readings[vm.key] = self._read_vm(vm)
            except VmGone:
                continue
            except MalformedData as err:
                self._on_error(vm.key.pid, "malformed", str(err))
                readings[vm.key] = VmCounters(problem=str(err))
            except OSError as err:
                self._on_error(vm.key.pid, "unreadable", f"cannot borrow its statistics fds: {err.strerror}")
                readings[vm.key] = VmCounters(problem=f"cannot borrow its statistics fds: {err.strerror}")
        self._layouts = {key: layout for key, layout in self._layouts.items() if key in readings}
        return readings

    def close(self) -> None:
        """Hold nothing: there is nothing to give back."""

    def _read_vm(self, vm: HeldVm) -> VmCounters:
        if not vm.stats_fds or vm.pidfd < 0:
            return VmCounters(problem="its VMM holds no statistics fds (QEMU does from 8.1 on)")
        vcpu_ids = tuple(sorted(vm.stats_fds))
        blocks = [self._read_vcpu(vm, vcpu_id) for vcpu_id in vcpu_ids]
        layout = self._layouts[vm.key]
        columns = zip(*(layout.values.unpack(block) for block in blocks), strict=True)
        return VmCounters(vcpu_ids, (None,) * len(vcpu_ids), dict(zip(layout.names, columns, strict=True)))

    def _read_vcpu(self, vm: HeldVm, vcpu_id: int) -> bytes:
        origin = f"statistics fd of pid {vm.key.pid}, vcpu_id {vcpu_id}"
        try:
            fd = syscalls.pidfd_getfd(vm.pidfd, vm.stats_fds[vcpu_id])
        except OSError as err:
            if err.errno in (errno.ESRCH, errno.EBADF):  # EBADF: an exiting process has lost its files already
                raise VmGone(origin) from err
            raise
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != f"anon_inode:kvm-vcpu-stats:{vcpu_id}":
                raise MalformedData(origin, "the fd holds another file by now")
            if vm.key not in self._layouts:
                self._layouts[vm.key] = read_layout(fd, self._wanted, origin)
            layout = self._layouts[vm.key]
            block = os.pread(fd, layout.length, layout.offset)
        finally:
            os.close(fd)
        if len(block) < layout.length:
            raise MalformedData(origin, f"{len(block)} bytes of counters, {layout.length} expected")
        return block
