"""Captures fixtures from the kernel that runs: statistics files of a vCPU and a VM, a processor of /proc/cpuinfo.

``python -m tests.capture_kernel`` writes below tests/fixtures/, the kernel's identity beside each capture. What the
statistics must say is known without decoding them: the guest made PORT_WRITES port writes, and each is an exit, as
is the halt at the end.
"""

from __future__ import annotations

import json
import os
import platform
import struct
from pathlib import Path

from kvm import syscalls
from tests.live import open_guest_process

FIXTURES = Path(__file__).parent / "fixtures"
PORT_WRITES = 23
KERNEL = platform.release().split("-")[0]
NAME = f"linux-{'.'.join(KERNEL.split('.')[:2])}"


def capture_statistics(directory: Path) -> None:
    with open_guest_process(name="captured", stats_fds=True, port_writes=PORT_WRITES) as guest:
        pidfd = os.pidfd_open(guest.pid)
        fd = syscalls.pidfd_getfd(pidfd, guest.vcpus[0].stats_fd)
        block = os.pread(fd, 1 << 20, 0)
        os.close(fd)
        os.close(pidfd)
        thread = guest.vcpus[0].tid
    exits = next(
        number for number in (PORT_WRITES, PORT_WRITES + 1, PORT_WRITES + 2) if struct.pack("=Q", number) in block
    )
    (directory / f"{NAME}.bin").write_bytes(block)
    said = {
        "kernel": KERNEL,
        "id": f"kvm-{thread}/vcpu-0",
        "descriptors": struct.unpack_from("=6I", block)[2],
        "exits": exits,
        "notify_window_exits": 0,
    }
    (directory / f"{NAME}.json").write_text(json.dumps(said, indent=2) + "\n")


def capture_vm_statistics(directory: Path) -> None:
    with open_guest_process(name="captured", vm_stats_fd=True, port_writes=PORT_WRITES) as guest:
        pidfd = os.pidfd_open(guest.pid)
        fd = syscalls.pidfd_getfd(pidfd, guest.vm_stats_fd)
        block = os.pread(fd, 1 << 20, 0)
        os.close(fd)
        os.close(pidfd)
    (directory / f"{NAME}.bin").write_bytes(block)
    (directory / f"{NAME}.json").write_text(json.dumps({"kernel": KERNEL}) + "\n")


def capture_cpuinfo(directory: Path) -> None:
    block = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    (directory / "cpuinfo").write_text(block + "\n\n")
    (directory / "cpuinfo.json").write_text(json.dumps({"kernel": KERNEL}) + "\n")


if __name__ == "__main__":
    captures = {"stats": capture_statistics, "vm_stats": capture_vm_statistics, "host": capture_cpuinfo}
    for where, capture in captures.items():
        (FIXTURES / where).mkdir(parents=True, exist_ok=True)
        capture(FIXTURES / where)
