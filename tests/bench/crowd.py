"""Makes thousands of vCPUs on /dev/kvm: processes that hold VMs as VMMs do, and run them when they are told to.

Run as a program it forks, one process a VM; each makes its vCPUs with their stats fds (as QEMU 8.1 does) and some
eventfds. It prints ``ready`` when all are there. For each line of its input, a number, every vCPU of so many VMs takes
a VM exit (the guest halts), and ``ready`` is printed again. It ends, with all of them, at the end of its input, or once
one of them has ended, as where there is no memory for so many.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tests.live.tiny_guest import CODE, KVM_RUN, KVM_SET_REGS, Vcpu, Vm

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
HALT_FOR_EVER = b"\xf4\xeb\xfd"  # hlt; jmp to it


def hold_vm(vcpus: int, eventfds: int, ready: int) -> None:
    """Make one VM, say so on the pipe ``ready``, and let each vCPU run to its next halt at each SIGUSR1."""
    vm = Vm()
    vm.memory[CODE : CODE + len(HALT_FOR_EVER)] = HALT_FOR_EVER
    registers = struct.pack("<18Q", *[0] * 16, CODE, 2)  # rip, rflags
    made = []
    for vcpu_id in range(vcpus):
        vcpu = Vcpu(vm, vcpu_id, vcpu_id, "")
        vcpu.create(with_stats_fd=True)
        fcntl.ioctl(vcpu.fd, KVM_SET_REGS, registers)
        made.append(vcpu.fd)
    for _ in range(eventfds):
        os.eventfd(0)
    while True:
        os.write(ready, b".")
        signal.sigwait({signal.SIGUSR1})
        for fd in made:
            fcntl.ioctl(fd, KVM_RUN, 0)


def fall_apart(_signal: int, _frame: object) -> NoReturn:
    """End it: that a member has ended would never be seen in the pipe, whose end the others hold too."""
    raise SystemExit("a member of the crowd has ended")


def main() -> None:
    """Make the crowd, say ``ready``, and end it when the input ends."""
    parser = argparse.ArgumentParser()
    for name in ("vms", "vcpus", "eventfds"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGCHLD, fall_apart)
    told, ready = os.pipe()
    members = []
    for _ in range(arguments.vms):
        member = os.fork()
        if member == 0:
            try:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # none outlives us
                hold_vm(arguments.vcpus, arguments.eventfds, ready)
            finally:
                os._exit(1)
        members.append(member)
    os.close(ready)
    running = members
    while True:
        for _ in running:
            os.read(told, 1)
        print("ready", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        running = members[: int(line)]
        for member in running:
            os.kill(member, signal.SIGUSR1)


class Crowd:
    """A crowd that is there."""

    def __init__(self, process: subprocess.Popen[str], vms: int) -> None:
        self._process, self._vms = process, vms
        self.wait()

    def run(self, vms: int | None = None) -> None:
        """Let every vCPU of so many VMs, by default of all, take a VM exit: their ``exits`` move."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._vms if vms is None else vms}\n")
        self._process.stdin.flush()
        self.wait()

    def wait(self) -> None:
        """Wait until all have done what they were told."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the crowd has fallen apart")


@contextmanager
def open_crowd(vms: int, vcpus: int, eventfds: int = 0) -> Iterator[Crowd]:
    """Hold a crowd of ``vms`` processes with ``vcpus`` vCPUs each."""
    words = [sys.executable, "-m", "tests.bench.crowd", str(vms), str(vcpus), str(eventfds)]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield Crowd(process, vms)
        process.communicate()


if __name__ == "__main__":
    main()
