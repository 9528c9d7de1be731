"""Opens paths below another process's root without ever leaving it, whatever links and renames are there.

openat2(2) with RESOLVE_IN_ROOT does that. Where it may not be called (ENOSYS under systemd's RestrictSUIDSGID=, EPERM
in containers of old), we walk ourselves: component by component, each opened with O_PATH and O_NOFOLLOW below an fd of
the one before, links by what they say, and ``..`` by the fds that are held. So no name is ever looked up above the
root, and no rename can put something else in the place of what was checked.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from kvm import syscalls

_NOT_TO_BE_CALLED: Final = (errno.ENOSYS, errno.EPERM)
# As many as path_resolution(7) follows.
_MAX_LINKS: Final = 40


def open_in_root(root_fd: int, path: str, *, is_directory: bool = False) -> int:
    """Return an O_PATH fd of a path as a process with that root would find it; raises OSError."""
    try:
        return syscalls.open_in_root(root_fd, path, os.O_PATH | (os.O_DIRECTORY if is_directory else 0))
    except OSError as err:
        if err.errno not in _NOT_TO_BE_CALLED:
            raise
    return walk_in_root(root_fd, path, is_directory=is_directory)


def walk_in_root(root_fd: int, path: str, *, is_directory: bool = False) -> int:
    """Do as ``open_in_root`` does, without openat2(2); raises OSError."""
    if not path:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    held: list[int] = []  # what has been walked through, from below the root on
    pending = _split(path.encode("utf-8", "surrogateescape"))
    links = 0
    try:
        while pending:
            name = pending.pop()
            if name in (b".", b".."):
                if held and name == b"..":
                    os.close(held.pop())
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held[-1] if held else root_fd)
            held.append(fd)
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(b"", dir_fd=fd)
                os.close(held.pop())
                while held and target.startswith(b"/"):
                    os.close(held.pop())
                pending += _split(target)
            elif pending and not stat.S_ISDIR(mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        found = held[-1] if held else root_fd
        if is_directory and not stat.S_ISDIR(os.fstat(found).st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return held.pop() if held else os.dup(root_fd)
    finally:
        for fd in held:
            os.close(fd)


def _split(path: bytes) -> list[bytes]:
    """Return the names in a path, the first one last; what ends in a slash must be a directory, as with ``/.``."""
    names = [name for name in path.split(b"/") if name]
    return [*([b"."] if path.endswith(b"/") else []), *reversed(names)]
