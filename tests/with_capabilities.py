"""``with_capabilities.py UID CAP_A,CAP_B COMMAND...`` runs a command as a user with these capabilities and no others.

As setpriv does, which busybox has not. Takes nothing but Python, and is told apart from the code that it tests: numbers
are those of include/uapi/linux/capability.h and prctl.h once more. "" is no capability at all.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from typing import Final

NUMBERS: Final = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
PR_SET_KEEPCAPS, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 8, 23, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
SYS_CAPSET: Final = 126
VERSION_3: Final = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def call(*arguments: int) -> int:
    """prctl(2); raises OSError."""
    result: int = _libc.prctl(*[ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:5]])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl{arguments}")
    return result


def keep(uid: int, names: list[str]) -> None:
    """Become that user, and keep these capabilities over what is run next."""
    bits = sum(1 << NUMBERS[name] for name in names)
    for number in range(41):
        if not bits >> number & 1 and call(PR_CAPBSET_READ, number):
            call(PR_CAPBSET_DROP, number)
    call(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    header = struct.pack("=Ii", VERSION_3, 0)
    data = struct.pack("=6I", *[bits & 0xFFFFFFFF] * 3, *[bits >> 32] * 3)
    if _libc.syscall(SYS_CAPSET, header, data):
        raise OSError(ctypes.get_errno(), "capset")
    for name in names:
        call(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, NUMBERS[name])
    call(PR_SET_NO_NEW_PRIVS, 1)


if __name__ == "__main__":
    keep(int(sys.argv[1]), [name for name in sys.argv[2].split(",") if name])
    os.execvp(sys.argv[3], sys.argv[3:])
