"""Finds tracefs, wherever it is mounted, and reads what tracepoints say about themselves; explains what is missing.

Nothing is mounted where anybody sees it and nothing is written: tracefs is only where the kernel keeps a tracepoint's
number and format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kvm.errors import MalformedData, SourceUnavailable
from kvm.host.lockdown import read_lockdown
from kvm.host.private_mount import PrivateMount
from kvm.perf.tracepoint_format import Tracepoint, parse_format

# Fields 5 and, behind the dash, 9 of a line of /proc/PID/mountinfo: mount point and type (proc_pid_mountinfo(5)).
_MOUNT = re.compile(r"^(?:\S+ ){4}(\S+) .* - tracefs ", re.MULTILINE)
_ESCAPED = re.compile(r"\\([0-7]{3})")


def parse_tracefs_mounts(mountinfo: str) -> tuple[Path, ...]:
    """Return where tracefs is mounted according to a /proc/PID/mountinfo, in the order of mounting."""
    return tuple(Path(_ESCAPED.sub(lambda found: chr(int(found[1], 8)), path)) for path in _MOUNT.findall(mountinfo))


def find_places(preferred: Path, proc: Path, sysfs: Path) -> Iterator[Path]:
    """Return where tracefs may be: the preferred place, below debugfs, and wherever else it is mounted."""
    yield preferred
    yield sysfs / "kernel/debug/tracing"
    try:
        mountinfo = (proc / "self/mountinfo").read_text(errors="replace")
    except OSError:
        return  # the usual places are what is left to try
    yield from parse_tracefs_mounts(mountinfo)


class Tracefs:
    """Where tracefs is; ``is_private`` where it is an instance of our own, which ends when this is closed."""

    def __init__(self, path: Path, private: PrivateMount | None = None) -> None:
        self.path = path
        self._private = private

    @property
    def is_private(self) -> bool:
        """Whether nobody else sees this instance."""
        return self._private is not None

    def close(self) -> None:
        """Give back what is held; may be called twice."""
        if self._private is not None:
            self._private.close()


def open_tracefs(
    preferred: Path,
    proc: Path = Path("/proc"),
    sysfs: Path = Path("/sys"),
    open_private: Callable[[str], PrivateMount] = PrivateMount,
) -> Tracefs:
    """Return a place where tracefs is and may be read; raises SourceUnavailable.

    Where it is mounted nowhere, it is opened as a private instance, which takes CAP_SYS_ADMIN.
    """
    refused: list[str] = []
    for place in find_places(preferred, proc, sysfs):
        try:
            if (place / "events").is_dir():
                return Tracefs(place)
        except OSError as err:
            refused.append(f"{place}: {err.strerror}")
    if read_lockdown(sysfs, open_private).mode == "confidentiality":
        # fs/tracefs/inode.c makes no files where lockdown forbids LOCKDOWN_TRACEFS from the start.
        raise SourceUnavailable("lockdown=confidentiality: the kernel offers no tracefs", "use lockdown=integrity")
    if refused:
        remedy = "run as root, give CAP_DAC_READ_SEARCH, or mount tracefs with gid=; in a container, mount the host's"
        raise SourceUnavailable("; ".join(refused), remedy)
    remedy = f"mount -t tracefs tracefs {preferred}, or give CAP_SYS_ADMIN; in a container, mount the host's"
    nowhere = f"tracefs is not mounted at {preferred} or anywhere else"
    try:
        private = open_private("tracefs")
    except OSError as err:
        raise SourceUnavailable(f"{nowhere}, and this process may not open it ({err.strerror})", remedy) from err
    try:
        if (private.path / "events").is_dir():
            return Tracefs(private.path, private)
    except OSError as err:  # it belongs to root alone, however it was opened
        private.close()
        remedy = "run as root, or give CAP_DAC_READ_SEARCH"
        why = f"a private instance of it may not be read ({err.strerror})"
        raise SourceUnavailable(f"{nowhere}, and {why}", remedy) from err
    private.close()
    raise SourceUnavailable(f"{nowhere}, and a private instance of it has no events", remedy)


def read_tracepoint(tracefs: Path, system: str, name: str) -> Tracepoint:
    """Read a tracepoint's number and format; raises FileNotFoundError where there is none, else SourceUnavailable."""
    path = tracefs / "events" / system / name / "format"
    try:
        return parse_format(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except FileNotFoundError:
        raise  # what is missing, and where to get it, its reader knows
    except OSError as err:
        raise SourceUnavailable(f"{path.parent}: {err.strerror}", "run as root or give CAP_DAC_READ_SEARCH") from err
    except MalformedData as err:
        raise SourceUnavailable(str(err), "please report this with the kernel's version") from err
