"""Finds tracefs, wherever it is mounted, and reads what tracepoints say about themselves; explains what is missing.

Nothing is mounted and nothing is written: tracefs is only where the kernel keeps a tracepoint's number and format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvm.errors import SourceUnavailable
from kvm.host.lockdown import read_lockdown
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


def find_tracefs(preferred: Path, proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> Path:
    """Return a place where tracefs is and may be looked into; raises SourceUnavailable."""
    refused: list[str] = []
    for place in find_places(preferred, proc, sysfs):
        try:
            if (place / "events").is_dir():
                return place
        except OSError as err:
            refused.append(f"{place}: {err.strerror}")
    if read_lockdown(sysfs) == "confidentiality":
        # fs/tracefs/inode.c makes no files where lockdown forbids LOCKDOWN_TRACEFS from the start.
        raise SourceUnavailable("lockdown=confidentiality: the kernel offers no tracefs", "use lockdown=integrity")
    if refused:
        remedy = "run as root, give CAP_DAC_READ_SEARCH, or mount tracefs with gid=; in a container, mount the host's"
        raise SourceUnavailable("; ".join(refused), remedy)
    remedy = f"mount -t tracefs tracefs {preferred}; in a container, mount the host's"
    raise SourceUnavailable(f"tracefs is not mounted at {preferred} or anywhere else", remedy)


def read_tracepoint(tracefs: Path, system: str, name: str) -> Tracepoint:
    """Read a tracepoint's number and format; raises FileNotFoundError, OSError, MalformedData."""
    path = tracefs / "events" / system / name / "format"
    return parse_format(path.read_text(encoding="utf-8", errors="replace"), str(path))
