"""Opens an instance of a kernel file system that nobody else sees, where none is mounted.

A new machine has neither tracefs nor securityfs mounted, and an agent must not mount what other people then see. The
mount API makes a mount that is attached nowhere: it is reached through its fd alone, and is gone when that is closed.
fsopen(2), fsconfig(2), fsmount(2): Linux 5.2; it takes CAP_SYS_ADMIN.

The kernel has one superblock of each of these file systems, shared by all its mounts. Before Linux kernel commit
47311db8e8f3 "tracefs: Only clobber mode/uid/gid on remount if asked" (in v6.0 and stable trees) another mount reset the
mode and group that somebody had given tracefs. So a private instance is the last resort, where no mount is visible, and
no options are set.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvm import abi, syscalls


class PrivateMount:
    """A detached, read-only mount; ``path`` leads there for this process, until it is closed."""

    def __init__(self, file_system: str) -> None:
        """Open it, as ``tracefs``; raises OSError."""
        context = syscalls.fsopen(file_system, abi.FSOPEN_CLOEXEC)
        try:
            syscalls.fsconfig_create(context)
            attributes = abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
            self._fd = syscalls.fsmount(context, abi.FSMOUNT_CLOEXEC, attributes)
        finally:
            os.close(context)
        self.path = Path(f"/proc/self/fd/{self._fd}")

    def close(self) -> None:
        """Let it go; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
