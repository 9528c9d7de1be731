"""VMs of an unprivileged user whose owner nobody can look up: a lookup hangs in the kernel. ``COUNT``.

It opens /dev/kvm as root, becomes that user, and then root of a user and mount namespace of its own, with a FUSE file
system of its own over ``/run/libvirt``. Whoever looks for a file there waits for an answer of this program, which
never comes, and no signal ends that. The command lines hang as well: each VM's process maps a file of that file system
whose page is being read for ever, and so holds its mmap_lock. Prints ``ready`` when its VMs are there; ends at the end
of its input, and with it the file system and every wait.

A page of such a file over the command line itself would not do: since Linux 4.17 (commit 7f7ccc2ccc2e "proc: do not
access cmdline nor environ from file-backed areas") that is not read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tests.hostile.held import hold, open_children, open_held
from tests.hostile.impostor import CLONE_NEWNS, KVM_CREATE_VCPU, KVM_CREATE_VM, become_root_of_a_namespace
from tests.live import tiny_guest
from tests.waiting import wait_until

# include/uapi/linux/fuse.h
FUSE_LOOKUP, FUSE_FORGET, FUSE_GETATTR, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 2, 3, 14, 15, 26
FUSE_IN_HEADER, FUSE_OUT_HEADER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
FUSE_ATTR = struct.Struct("<6Q10I")
FUSE_INIT_OUT = struct.Struct("<4I2H2I2H8I")
ROOT_NODE, FILE_NODE = 1, 2
FILE_BYTES = 1 << 20
DEVICE = Path("/mnt/fuse")
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # include/uapi/linux/mount.h
REQUEST_BYTES = 1 << 18
MAP_PRIVATE = 0x02  # include/uapi/linux/mman.h
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1, 2
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def make_open_device() -> None:
    """Make a /dev/fuse for everybody, as hosts have it, seen by this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for source, place, kind, flags in ((b"none", b"/", None, MS_REC | MS_PRIVATE), (b"none", b"/mnt", b"tmpfs", 0)):
        if libc.mount(source, place, kind, flags, None):
            raise OSError(ctypes.get_errno(), "mount")
    os.mknod(DEVICE, stat.S_IFCHR | 0o666, Path("/dev/fuse").stat().st_rdev)
    DEVICE.chmod(0o666)


def build_attr(node: int) -> bytes:
    """A ``struct fuse_attr``: the root is a directory, all else a file."""
    mode = 0o40755 if node == ROOT_NODE else 0o100644
    return FUSE_ATTR.pack(node, FILE_BYTES, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> tuple[int, bytes] | None:
    """What is answered: an error and a body; None for never."""
    if opcode == FUSE_INIT:
        return 0, FUSE_INIT_OUT.pack(7, 31, 0, 0, 16, 12, 4096, 1, 1, *[0] * 9)
    if opcode == FUSE_GETATTR:
        return 0, struct.pack("<QII", 3600, 0, 0) + build_attr(node)
    if opcode == FUSE_OPEN:
        is_for_writing = struct.unpack_from("<I", body)[0] & os.O_ACCMODE != os.O_RDONLY
        return 0, struct.pack("<QII", 1, FOPEN_KEEP_CACHE | (FOPEN_DIRECT_IO if is_for_writing else 0), 0)
    if opcode == FUSE_LOOKUP and body == b"file\0":
        return 0, struct.pack("<4Q2I", FILE_NODE, 0, 3600, 3600, 0, 0) + build_attr(FILE_NODE)
    return None if opcode in (FUSE_LOOKUP, FUSE_READ) else (-errno.ENOSYS, b"")


def serve(fuse: int) -> None:
    """Answer the kernel, as little as it takes, until the file system is unmounted."""
    while True:
        try:
            request = os.read(fuse, REQUEST_BYTES)
        except OSError as err:
            if err.errno == errno.ENODEV:
                return
            continue
        _length, opcode, unique, node, *_rest = FUSE_IN_HEADER.unpack_from(request)
        if opcode == FUSE_FORGET:
            continue
        found = answer(opcode, node, request[FUSE_IN_HEADER.size :])
        if found is not None:
            os.write(fuse, FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size + len(found[1]), found[0], unique) + found[1])


def hold_vm(kvm: int, file: int) -> None:
    """Make a VM, and map a file whose page is locked: the kernel waits for it and holds this process's mmap_lock."""
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ, MAP_PRIVATE, file, ctypes.c_long(0))


def start(work: Callable[[], object]) -> int:
    """Do something in a child that ends with us; gives its pid."""
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            work()
        finally:
            os._exit(1)
    return child


def wait_until_hung(pid: int) -> None:
    """Wait until a process waits in the kernel for an answer, or for who waits for one."""
    directory = Path(f"/proc/{pid}")

    def hangs() -> bool:
        state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
        return state == "D" or (directory / "wchan").read_text() == "request_wait_answer"

    wait_until(hangs, f"{pid} hangs")


def main(count: int) -> None:
    """Mount it, and hold so many VMs behind it, each in a process of its own."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    make_open_device()
    libc = become_root_of_a_namespace()
    fuse = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)  # by who mounts, or the kernel refuses it
    Path("/run/libvirt").mkdir()
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"none", b"/run/libvirt", b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    with open_children() as children:
        # Nobody else has the device open, and whoever waits does it elsewhere: the server's end ends every wait.
        children.append(start(lambda: serve(fuse)))
        os.close(fuse)
        file, uncached = (os.open("/run/libvirt/file", flags) for flags in (os.O_RDONLY, os.O_RDWR))
        children.append(start(lambda: os.pread(file, mmap.PAGESIZE, 0)))
        wait_until_hung(children[1])
        children += [start(lambda: hold_vm(kvm, uncached)) for _ in range(count)]
        for child in children[2:]:
            wait_until_hung(child)
        hold()


def open_hung_owners(count: int) -> AbstractContextManager[int]:
    """Hold so many such VMs; gives the pid of the parent of their processes."""
    words = ["/usr/bin/qemu-system-x86_64", "-m", "tests.hostile.hung_owner", str(count), "-name", "guest=hung"]
    return open_held(words, tiny_guest.PYTHON, tiny_guest.build_environment())


if __name__ == "__main__":
    main(int(sys.argv[1]))
