"""Writes cpio archives of the kind that the kernel unpacks as an initramfs ("newc").

The format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
Archives can be joined end to end, and a later file replaces an earlier one of its name: so what seldom
changes is written once, and what changes with each run is a small archive of its own.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

BLOCK_BYTES = 512


class CpioWriter:
    """Writes entries to an open file; `close` ends the archive, the file stays open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written: set[str] = set()
        self._size = 0

    def add_directory(self, path: str) -> None:
        """Adds a directory and those above it, each once."""
        if path in ("", ".") or path in self._written:
            return
        self.add_directory(str(PurePosixPath(path).parent))
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def add_file(self, path: str, data: bytes, executable: bool = False) -> None:
        """Adds a file with its content."""
        self.add_directory(str(PurePosixPath(path).parent))
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def add_link(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self.add_directory(str(PurePosixPath(path).parent))
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_tree(self, root: Path, at: str = "", wanted: Callable[[str], bool] = lambda _path: True) -> None:
        """Adds what is below a directory; `wanted` is asked with each path relative to it."""
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root).as_posix()
            inside = f"{at}/{relative}".lstrip("/")
            if not wanted(relative):
                continue
            if path.is_symlink():
                self.add_link(inside, str(path.readlink()))
            elif path.is_dir():
                self.add_directory(inside)
            elif path.is_file():
                self.add_file(inside, path.read_bytes(), bool(path.stat().st_mode & 0o100))

    def close(self) -> None:
        """Writes the trailer, and zeros up to a block."""
        self._add("TRAILER!!!", 0, b"")
        self._pad(BLOCK_BYTES)

    def _add(self, path: str, mode: int, data: bytes) -> None:
        self._written.add(path)
        name = path.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        self._write(b"070701" + b"".join(b"%08X" % number for number in numbers) + name)
        self._pad(4)
        self._write(data)
        self._pad(4)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)

    def _pad(self, unit: int) -> None:
        self._write(bytes(-self._size % unit))
