"""Makes VMs that live for a second or two, all the time, as an unprivileged user: ``BIRTHS_A_SECOND``.

Each second one process comes whose command line says whose VMs they are: those of somebody else. Prints ``ready``, and
at the end of its input how many there were.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from contextlib import AbstractContextManager
from typing import Final

from tests.hostile.held import Attack, open_attack
from tests.hostile.impostor import KVM_CREATE_VCPU, KVM_CREATE_VM, NOBODY
from tests.live import tiny_guest

LIFE_SECONDS: Final = 1.5
PROCESS_BIRTHS: Final = 60  # within what is shown of one process


def live(kvm: int, births: int) -> None:
    """Be one of the processes, from the making of its VMs to their end."""
    os.setresuid(NOBODY, NOBODY, NOBODY)
    vms = [fcntl.ioctl(kvm, KVM_CREATE_VM, 0) for _ in range(births)]
    fcntl.ioctl(vms[0], KVM_CREATE_VCPU, 0)
    time.sleep(LIFE_SECONDS)  # that is the attack; nobody waits for it


def main(births_a_second: int) -> None:
    """Make them until the end of the input."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    born, living, next_at = 0, set[int](), time.monotonic()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], max(0.0, next_at - time.monotonic()))[0]:
        next_at += 1.0
        for first in range(0, births_a_second, PROCESS_BIRTHS):
            births = min(PROCESS_BIRTHS, births_a_second - first)
            child = os.fork()
            if child == 0:
                try:
                    live(kvm, births)
                    os._exit(0)
                finally:
                    os._exit(1)
            living.add(child)
            born += births
        for child in tuple(living):
            pid, status = os.waitpid(child, os.WNOHANG)
            living -= {pid}
            if status:
                raise SystemExit("a process could not make its VMs")
    for child in living:
        os.waitpid(child, 0)
    print(json.dumps({"born": born}))


def open_born(births_a_second: int, name: str, uuid: str) -> AbstractContextManager[Attack]:
    """Let so many VMs a second be born that claim to be another one."""
    words = ["/usr/bin/qemu-system-x86_64", "-m", "tests.hostile.births", str(births_a_second)]
    words += ["-name", f"guest={name}", "-uuid", uuid]
    return open_attack("births", words, tiny_guest.PYTHON, tiny_guest.build_environment())


if __name__ == "__main__":
    main(int(sys.argv[1]))
