"""``refuse_syscalls.py NAME,NAME COMMAND...`` runs a command to which the kernel refuses these system calls (EPERM).

``NAME,NAME=ENOSYS`` has it answer as a kernel does that has no such calls.

Takes nothing but Python: it runs before rights are given up.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import Final

# x86-64; arch/x86/entry/syscalls/syscall_64.tbl
NUMBERS: Final = {
    "kcmp": 312,
    "perf_event_open": 298,
    "bpf": 321,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "fsopen": 430,
    "capset": 126,
    "openat2": 437,
}
# include/uapi/linux/prctl.h, seccomp.h, audit.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
# include/uapi/linux/bpf_common.h: load a word of the data at an offset, jump if equal, return a constant
BPF_LD_W_ABS, BPF_JMP_JEQ_K, BPF_RET_K = 0x20, 0x15, 0x06


class Program(ctypes.Structure):
    """struct sock_fprog (include/uapi/linux/filter.h)."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def encode_filter(numbers: list[int], error: int) -> bytes:
    """The instructions (struct sock_filter) that refuse these system calls and let all others be."""
    lines = [(BPF_LD_W_ABS, 0, 0, 0)]
    lines += [(BPF_JMP_JEQ_K, len(numbers) - position, 0, number) for position, number in enumerate(numbers)]
    lines += [(BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW), (BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO | error)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def refuse(names: list[str], error: int) -> None:
    """Set the filter for this process and its children; it takes CAP_SYS_ADMIN."""
    code = encode_filter([NUMBERS[name] for name in names], error)
    program = Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    refused, _, answer = sys.argv[1].partition("=")
    refuse(refused.split(","), getattr(errno, answer or "EPERM"))
    os.execvp(sys.argv[2], sys.argv[2:])
