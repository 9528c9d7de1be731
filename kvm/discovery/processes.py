"""Reads what a process is, and holds on to it: state, parent, start time, a living thread, a pidfd."""

from __future__ import annotations

import contextlib
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from kvm import abi
from kvm.errors import MalformedData, VmGone
from kvm.model import VmKey


class ProcessStat(NamedTuple):
    """Fields 3 and 22 of a /proc/PID/stat."""

    state: str
    start_ticks: int


def parse_stat(text: str, origin: str) -> ProcessStat:
    """Parse a /proc/PID/stat; raises MalformedData.

    A thread may be called ``) R 1 (``: the fields are counted from the last parenthesis.
    """
    fields = text.rpartition(")")[2].split()
    try:
        return ProcessStat(fields[0], int(fields[19]))
    except (IndexError, ValueError) as err:
        raise MalformedData(origin, f"no start time in {text[:80]!r}") from err


def read_stat(proc: Path, pid: int) -> ProcessStat:
    """Read what a process or thread is; raises OSError or MalformedData."""
    path = proc / str(pid) / "stat"
    return parse_stat(path.read_text(errors="replace"), str(path))


def parse_uids(status: str) -> tuple[int, ...]:
    """Return the real, effective, saved and file system uid of a /proc/PID/status; () where it tells none."""
    match = re.search(r"^Uid:((?:\s+\d{1,10}){4})$", status, re.MULTILINE | re.ASCII)
    return tuple(int(number) for number in match[1].split()) if match else ()


def read_uids(proc: Path, pid: int) -> tuple[int, ...]:
    """Read the uids of a process as `parse_uids` returns them; () where it has ended or is hidden."""
    try:
        return parse_uids((proc / str(pid) / "status").read_text(errors="replace"))
    except OSError:
        return ()


def read_uid(proc: Path, pid: int) -> int | None:
    """Read the real uid of a process, None where it has ended or is hidden."""
    uids = read_uids(proc, pid)
    return uids[0] if uids else None


def process_exists(pid: int) -> bool:
    """Tell whether there is a process of this number, which /proc may hide (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def find_living_thread(proc: Path, pid: int) -> int:
    """Return the leader, or where it has exited another thread of the process that still has its files.

    Raises FileNotFoundError where none is left.
    """
    if read_stat(proc, pid).state not in "ZX":
        return pid
    threads = proc / str(pid) / "task"
    for tid in sorted(os.listdir(threads), key=int):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if parse_stat((threads / tid / "stat").read_text(errors="replace"), tid).state not in "ZX":
                return int(tid)
    raise FileNotFoundError(pid)


def open_pidfd(pid: int, tid: int) -> int:
    """Return a pidfd through which the process's files can be had; raises OSError.

    Where the leader has exited that takes a pidfd of a thread: Linux kernel commit 64bef697d33b "pidfd: implement
    PIDFD_THREAD flag for pidfd_open()" (in v6.9); before, OSError with EINVAL.
    """
    return os.pidfd_open(pid) if tid == pid else os.pidfd_open(tid, abi.PIDFD_THREAD)


def open_vm_process(key: VmKey, proc: Path = Path("/proc")) -> int:
    """Return a pidfd of a VM's process, to be closed.

    Raises VmGone where it has ended, also if its pid lives on; OSError or MalformedData where that cannot be told,
    as without an fd left.
    """
    try:
        with ExitStack() as stack:
            pidfd = os.pidfd_open(key.pid)
            stack.callback(os.close, pidfd)
            if read_stat(proc, key.pid).start_ticks != key.start_ticks:
                raise VmGone(f"process {key.pid} is another one by now")
            stack.pop_all()
            return pidfd
    except (FileNotFoundError, ProcessLookupError) as err:
        raise VmGone(f"process {key.pid}: {err.strerror}") from err


def is_thread_of(pid: int, tid: int, proc: Path = Path("/proc")) -> bool:
    """Tell whether a thread belongs to a process."""
    try:
        return (proc / str(pid) / "task" / str(tid)).is_dir()
    except OSError:  # /proc hides the process
        return False
