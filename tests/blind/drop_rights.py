"""``drop_rights.py UID NUMBER,NUMBER COMMAND...`` runs a command as a user of these capabilities and no other rights.

Takes nothing but Python: the lab's setpriv knows no users. The numbers are those of include/uapi/linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Final

# include/uapi/linux/prctl.h, capability.h; arch/x86/entry/syscalls/syscall_64.tbl
PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 24, 47, 2
VERSION_3: Final = 0x20080522
CAPSET: Final = 126

libc = ctypes.CDLL(None, use_errno=True)


def prctl(*arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:5]]
    if libc.prctl(*words):
        raise OSError(ctypes.get_errno(), f"prctl{arguments}")


def drop(uid: int, held: set[int]) -> None:
    """Leave this process and its children these capabilities; it takes all that are given up."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in set(range(last + 1)) - held:
        prctl(PR_CAPBSET_DROP, number)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    mask = sum(1 << number for number in held)
    words = [mask & 0xFFFFFFFF] * 3 + [mask >> 32] * 3  # effective, permitted, inheritable
    if libc.syscall(CAPSET, struct.pack("=Ii", VERSION_3, 0), struct.pack("=6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")
    for number in held:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


if __name__ == "__main__":
    drop(int(sys.argv[1]), {int(word) for word in sys.argv[2].split(",") if word})
    os.execvp(sys.argv[3], sys.argv[3:])
