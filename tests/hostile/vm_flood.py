"""Makes as many VMs on ``/dev/kvm`` as it is told, in several processes of one uid: ``PROCESSES VMS_EACH UID``.

Prints ``ready`` when all are there; ends, with all of them, at the end of its input.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
from contextlib import AbstractContextManager

from tests.hostile.held import hold, open_children, open_held

KVM_CREATE_VM = 0xAE01  # include/uapi/linux/kvm.h


def hold_vms(kvm: int, count: int, uid: int, ready: int) -> None:
    """Make so many VMs as this user, say so, and hold them for ever."""
    os.setresuid(uid, uid, uid)
    for _ in range(count):
        fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    os.write(ready, b".")
    signal.pause()


def main(processes: int, vms_each: int, uid: int) -> None:
    """Make them and hold them."""
    needed = vms_each + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    told, ready = os.pipe()
    with open_children() as children:
        for _ in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    hold_vms(kvm, vms_each, uid, ready)
                finally:
                    os._exit(1)
            children.append(child)
        os.close(ready)
        for _ in children:
            if not os.read(told, 1):
                raise SystemExit("a process could not make its VMs")
        hold()


def open_flood(processes: int, vms_each: int, uid: int) -> AbstractContextManager[int]:
    """Hold so many VMs; gives the pid of the parent of their processes."""
    return open_held([sys.executable, "-m", "tests.hostile.vm_flood", str(processes), str(vms_each), str(uid)])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
