"""Makes thousands of vCPUs on /dev/kvm: processes that hold VMs as VMMs do, and do nothing else.

Run as a program it forks, one process a VM; each makes its vCPUs with their stats fds (as QEMU 8.1 does) and some
eventfds. It prints ``ready`` when all are there, and ends, with all of them, at the end of its input.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_GET_STATS_FD = 0xAE01, 0xAE41, 0xAECE  # include/uapi/linux/kvm.h


def hold_vm(vcpus: int, eventfds: int, ready: int) -> None:
    """Make one VM, say so on the pipe ``ready``, and wait for the end."""
    kvm = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    for vcpu_id in range(vcpus):
        fcntl.ioctl(fcntl.ioctl(vm, KVM_CREATE_VCPU, vcpu_id), KVM_GET_STATS_FD, 0)
    for _ in range(eventfds):
        os.eventfd(0)
    os.write(ready, b".")
    signal.pause()


def main() -> None:
    """Make the crowd, say ``ready``, and end it when the input ends."""
    parser = argparse.ArgumentParser()
    for name in ("vms", "vcpus", "eventfds"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    told, ready = os.pipe()
    members = []
    for _ in range(arguments.vms):
        member = os.fork()
        if member == 0:
            try:
                hold_vm(arguments.vcpus, arguments.eventfds, ready)
            finally:
                os._exit(1)
        members.append(member)
    os.close(ready)
    try:
        for _ in members:
            if not os.read(told, 1):
                raise SystemExit("a member of the crowd could not make its VM")
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        for member in members:
            os.kill(member, signal.SIGKILL)


@contextmanager
def open_crowd(vms: int, vcpus: int, eventfds: int = 0) -> Iterator[int]:
    """Hold a crowd of ``vms`` processes with ``vcpus`` vCPUs each; gives the pid of their parent."""
    words = [sys.executable, str(Path(__file__)), str(vms), str(vcpus), str(eventfds)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the crowd did not come together")
        yield process.pid
        process.communicate()


if __name__ == "__main__":
    main()
