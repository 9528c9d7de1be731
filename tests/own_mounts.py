"""A mount namespace of the tests' own, with the kernel's file systems that some of them look into.

A new machine has none of tracefs, debugfs, securityfs and bpffs mounted, and a test run leaves it so: what is mounted
here is seen by this process and its children only, and ends with them. Without root nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000  # include/uapi/linux/sched.h; Python 3.12 has os.unshare
# In this order: tracefs mounts itself below debugfs too.
FILE_SYSTEMS: Final = {
    "debugfs": "/sys/kernel/debug",
    "tracefs": "/sys/kernel/tracing",
    "securityfs": "/sys/kernel/security",
    "bpf": "/sys/fs/bpf",
}
# For tests that want to see such a machine: a shell's words, in a mount namespace of their own.
UNMOUNT_ALL: Final = (
    "mount --make-rprivate /; "
    "while mount | grep -qE ' type (tracefs|debugfs|securityfs|bpf) '; do "
    "umount -l $(mount | awk '$5 ~ /^(tracefs|debugfs|securityfs|bpf)$/ {print $3}' | tail -n 1); done"
)


def enter() -> None:
    """Leave the machine's mount namespace, and mount what is missing; raises OSError or CalledProcessError."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    mounted = read_mounts("self")
    for name, directory in FILE_SYSTEMS.items():
        if f"{name} {directory}" not in mounted and Path(directory).is_dir():
            subprocess.run(["mount", "-t", name, name, directory], check=True)


def read_mounts(pid: str) -> list[str]:
    """The mounts of these file systems that a process sees, each as its type and where it is."""
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        name = rest.split()[0]
        if name in FILE_SYSTEMS:
            found.append(f"{name} {fields.split()[4]}")
    return sorted(found)
