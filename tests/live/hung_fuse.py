"""``hung_fuse.py DIRECTORY`` mounts a file system there that never answers; it ends with the process that has run it.

A process that looks into the directory hangs in the kernel, and no signal ends it: the kernel waits for the answer to a
request that was read (request_wait_answer in fs/fuse/dev.c). Those that hang are let go when this one has ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys

# include/uapi/linux/fuse.h: struct fuse_in_header and fuse_out_header, FUSE_INIT's answer
IN_HEADER, OUT_HEADER, INIT_OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ"), struct.Struct("=4I2H2I2H8I")
FUSE_INIT = 26
BUFFER_BYTES = 1 << 18


def mount(directory: str) -> int:
    """Mount it; the answer is where its requests come from."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"hung", directory.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    return fd


def serve(fd: int, pidfd: int) -> None:
    """Answer the first request, which is the kernel's own, and read all others."""
    waiter = select.poll()
    waiter.register(fd, select.POLLIN)
    waiter.register(pidfd, select.POLLIN)
    while pidfd not in [ready for ready, _ in waiter.poll()]:
        request = os.read(fd, BUFFER_BYTES)
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        if opcode == FUSE_INIT:
            answer = INIT_OUT.pack(7, 31, 65536, 0, 12, 9, 65536, 1, 1, 0, *[0] * 8)
            os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(answer), 0, unique) + answer)


if __name__ == "__main__":
    device, parent = mount(sys.argv[1]), os.pidfd_open(os.getppid())
    if os.fork() == 0:
        for standard in range(3):
            os.close(standard)
        serve(device, parent)
