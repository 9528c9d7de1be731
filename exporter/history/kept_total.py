"""Carries the host's total of notify exits over a restart of the agent: a small file, if somebody names one.

Prometheus takes a counter that falls for one that began anew at 0, and adds all of it. So a total that is older than
the one last scraped must never come back: it would count thousands of exits a second time. The file therefore holds a
total only while no agent runs. Who starts takes it and leaves a mark; who ends in order writes its own. After a
``kill -9``, a crash, or a boot (``boot_id``) there is none, and the total begins at 0, which Prometheus knows.

The file is taken for hostile: whoever can write it can forge the total, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

MAX_BYTES: Final = 4096
MAX_TOTAL: Final = 1 << 63
VERSION: Final = 1


class BadState(ValueError):
    """There is no total to go on from in a file; the message says why."""


class KeptTotal:
    """The file at a path; ``boot_id`` is that of now, None where it is not known: then no total goes on."""

    def __init__(self, path: Path, boot_id: str | None) -> None:
        self._path, self._boot_id = path, boot_id
        self.succeeded = True
        """Whether the last reading or writing has succeeded."""

    def take(self) -> int:
        """Return the total of the agent before, 0 where there is none to go on from; from now on the file has none."""
        fields = {"file": str(self._path)}
        try:
            if self._boot_id is None:
                raise BadState(
                    "which boot this is cannot be read in /proc/sys/kernel/random (in a unit: ProcSubset=pid)"
                )
            total = parse_state(read_state(self._path), self._boot_id)
        except FileNotFoundError:
            total = None
        except (OSError, BadState) as err:
            total, self.succeeded = None, False
            log.error("the total of notify exits begins at 0", extra={"fields": fields | {"err": str(err)}})
        if not self._write(None):
            return 0  # the file cannot be told that its total is taken: another agent would take it once more
        log.debug("the total of notify exits goes on", extra={"fields": fields | {"from": total or 0}})
        return total or 0

    def keep(self, total: int) -> None:
        """Leave the total for the next agent: the last thing, when nobody can scrape it any more."""
        self._write(None if self._boot_id is None else total)

    def _write(self, total: int | None) -> bool:
        document = {"version": VERSION, "boot_id": self._boot_id, "notify_window_exits_total": total}
        try:
            write_state(self._path, json.dumps(document) + "\n")
        except OSError as err:
            self.succeeded = False
            is_directory = os.path.isdir(self._path)  # noqa: PTH112 - Path.is_dir() raises PermissionError
            remedy = "name a file in that directory" if is_directory else "make its directory the agent's own"
            fields = {"file": str(self._path), "err": err.strerror, "remedy": remedy}
            log.error("the total of notify exits cannot be kept", extra={"fields": fields})
            with contextlib.suppress(OSError):  # no total is better than an old one; a disk that is full allows that
                self._path.unlink(missing_ok=True)
            return False
        return True


def read_boot_id(proc: Path) -> str | None:
    """Return what this boot of the kernel is called, None where /proc does not tell."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def read_state(path: Path) -> bytes:
    """Read a small plain file, and no other; raises OSError and BadState."""
    with open(path, "rb", opener=_open_unfollowed) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadState("it is no plain file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadState(f"it has more than {MAX_BYTES} bytes")
    return content


def _open_unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def parse_state(content: bytes, boot_id: str) -> int | None:
    """Return the total of an agent that ended in order under this boot, None where there is none; raises BadState."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as err:
        raise BadState("it is no JSON") from err
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise BadState(f"it is not of version {VERSION}")
    total = document.get("notify_window_exits_total")
    if document.get("boot_id") != boot_id or total is None:
        return None
    if type(total) is not int or not 0 <= total < MAX_TOTAL:
        raise BadState("its notify_window_exits_total is no count")
    return total


def write_state(path: Path, text: str) -> None:
    """Replace a file so that it is the old or the new one, whatever ends meanwhile; raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # left by one that was killed, or put there: it is not written through
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
