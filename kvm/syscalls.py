"""The system calls that Python's library lacks, typed, raising OSError: the only ctypes on libc."""

from __future__ import annotations

import ctypes
import os

from kvm import abi

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# Called once a vCPU and snapshot, so its arguments' types are fixed here: that halves what a call costs.
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


def compare_files(pid: int, other_pid: int, fd: int, other_fd: int) -> int:
    """Compare two processes' fds: 0 for one open file, 1 if the first comes before the other, 2 if after.

    kcmp(2) with KCMP_FILE; the order is the kernel's own, and the same as long as it is up. Raises OSError: EPERM
    without CAP_SYS_PTRACE, EBADF for a closed fd, ESRCH for a process that has ended, ENOSYS without CONFIG_KCMP.
    """
    number = ctypes.c_ulong
    order = _syscall(
        abi.SYS_kcmp,
        ctypes.c_int(pid),
        ctypes.c_int(other_pid),
        ctypes.c_int(abi.KCMP_FILE),
        number(fd),
        number(other_fd),
    )
    return _checked(order, "kcmp")


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open ``path`` as if ``root_fd`` were the root directory, following no link out of it (openat2(2)).

    Raises OSError; ENOSYS before Linux 5.6.
    """
    how = abi.OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_MAGICLINKS)
    name = path.encode("utf-8", "surrogateescape")  # not in the locale's encoding, which may have no such letter
    result = _syscall(abi.SYS_openat2, ctypes.c_int(root_fd), name, ctypes.c_char_p(how), ctypes.c_size_t(len(how)))
    return _checked(result, "openat2")


def prctl(option: int, argument: int) -> int:
    """Ask or change something about this thread (prctl(2)); raises OSError."""
    rest = (ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    return _checked(_libc.prctl(ctypes.c_int(option), *rest), "prctl")


def capget() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable capabilities of this thread, a bit each; raises OSError."""
    header = ctypes.create_string_buffer(abi.CAPABILITY_HEADER.pack(abi.LINUX_CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(abi.CAPABILITY_DATA.size)
    _checked(_syscall(abi.SYS_capget, header, data), "capget")
    low = abi.CAPABILITY_DATA.unpack(data.raw[: abi.CAPABILITY_DATA.size])
    effective, permitted, inheritable = (low[part] | low[part + 3] << 32 for part in range(3))
    return effective, permitted, inheritable


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the capabilities of this thread; raises OSError: EPERM for one that is not permitted already."""
    header = ctypes.create_string_buffer(abi.CAPABILITY_HEADER.pack(abi.LINUX_CAPABILITY_VERSION_3, 0))
    sets = (effective, permitted, inheritable)
    low, high = ([bits >> shift & 0xFFFFFFFF for bits in sets] for shift in (0, 32))
    _checked(_syscall(abi.SYS_capset, header, ctypes.c_char_p(abi.CAPABILITY_DATA.pack(*low, *high))), "capset")


def fsopen(file_system: str, flags: int) -> int:
    """Begin to make an instance of a file system, and return the fd of its context (fsopen(2)).

    Raises OSError: EPERM without CAP_SYS_ADMIN, ENODEV where the kernel has no such file system.
    """
    return _checked(_syscall(abi.SYS_fsopen, ctypes.c_char_p(file_system.encode()), ctypes.c_uint(flags)), "fsopen")


def fsconfig_create(context_fd: int) -> None:
    """Make the instance (fsconfig(2) with FSCONFIG_CMD_CREATE); raises OSError."""
    nothing = ctypes.c_void_p()
    command = ctypes.c_uint(abi.FSCONFIG_CMD_CREATE)
    _checked(
        _syscall(abi.SYS_fsconfig, ctypes.c_int(context_fd), command, nothing, nothing, ctypes.c_int(0)), "fsconfig"
    )


def fsmount(context_fd: int, flags: int, attributes: int) -> int:
    """Return the fd of a mount of the instance that is attached nowhere (fsmount(2)); raises OSError."""
    arguments = (ctypes.c_int(context_fd), ctypes.c_uint(flags), ctypes.c_uint(attributes))
    return _checked(_syscall(abi.SYS_fsmount, *arguments), "fsmount")


def perf_event_open(attr: bytes, tid: int, flags: int) -> int:
    """Open a perf event of one thread, on whichever CPU it runs (perf_event_open(2)), and return its fd.

    Raises OSError: EACCES or EPERM without CAP_PERFMON, ESRCH where the thread has ended, EINVAL for a bad ``attr``.
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
