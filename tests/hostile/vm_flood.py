"""Makes as many VMs on ``/dev/kvm`` as it is told, in several processes of one uid: ``PROCESSES VMS_EACH UID``.

Prints ``ready`` when all are there; ends, with all of them, at the end of its input.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KVM_CREATE_VM = 0xAE01  # include/uapi/linux/kvm.h


def hold_vms(kvm: int, count: int, uid: int, ready: int) -> None:
    """Make so many VMs as this user, say so, and hold them for ever."""
    os.setresuid(uid, uid, uid)
    for _ in range(count):
        fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    os.write(ready, b".")
    signal.pause()


def main(processes: int, vms_each: int, uid: int) -> None:
    """Make them, say ``ready``, and end them at the end of the input."""
    needed = vms_each + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    told, ready = os.pipe()
    children = []
    try:
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
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


@contextmanager
def open_flood(processes: int, vms_each: int, uid: int) -> Iterator[int]:
    """Hold so many VMs; gives the pid of the parent of their processes."""
    words = [sys.executable, "-m", "tests.hostile.vm_flood", str(processes), str(vms_each), str(uid)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the flood could not be made")
            yield process.pid
        finally:
            process.communicate()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
