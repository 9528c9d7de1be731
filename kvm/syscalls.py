"""The system calls that Python's library lacks, typed, raising OSError: the only ctypes on libc."""

from __future__ import annotations

import ctypes
import os

from kvm import abi

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# Called once a vCPU and look, so its arguments' types are fixed here: that halves what a call costs.
_pidfd_getfd = _libc["syscall"]
_pidfd_getfd.restype = ctypes.c_long
_pidfd_getfd.argtypes = [ctypes.c_long] * 4


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """Return a copy, close-on-exec, of fd ``target_fd`` of the process behind ``pidfd`` (pidfd_getfd(2)).

    Raises OSError: EPERM without CAP_SYS_PTRACE, EBADF where that fd is closed, ESRCH where the process has ended.
    """
    fd: int = _pidfd_getfd(abi.SYS_pidfd_getfd, pidfd, target_fd, 0)
    return fd if fd >= 0 else _checked(fd, "pidfd_getfd")


def same_file(pid: int, fd: int, other_pid: int, other_fd: int) -> bool:
    """Tell whether two processes' fds are one open file (kcmp(2), KCMP_FILE); raises OSError."""
    number = ctypes.c_ulong
    order = _syscall(
        abi.SYS_kcmp,
        ctypes.c_int(pid),
        ctypes.c_int(other_pid),
        ctypes.c_int(abi.KCMP_FILE),
        number(fd),
        number(other_fd),
    )
    return _checked(order, "kcmp") == 0


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open ``path`` as if ``root_fd`` were the root directory, following no link out of it (openat2(2)).

    Raises OSError; ENOSYS before Linux 5.6.
    """
    how = abi.OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_MAGICLINKS)
    return _checked(
        _syscall(
            abi.SYS_openat2, ctypes.c_int(root_fd), os.fsencode(path), ctypes.c_char_p(how), ctypes.c_size_t(len(how))
        ),
        "openat2",
    )


def perf_event_open(attr: bytes, tid: int, flags: int) -> int:
    """Open an event of one thread on whatever CPU it runs (perf_event_open(2)); ``attr`` is a struct perf_event_attr.

    Raises OSError: ESRCH where the thread has ended, EACCES or EPERM without CAP_PERFMON, EINVAL for an unknown id.
    """
    return _checked(
        _syscall(
            abi.SYS_perf_event_open,
            ctypes.c_char_p(attr),
            ctypes.c_int(tid),
            ctypes.c_int(-1),
            ctypes.c_int(-1),
            ctypes.c_ulong(flags),
        ),
        "perf_event_open",
    )
