"""VMs that are born and die by the thousand, all with one identity: one conflict, and nothing grows."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.agents import open_agent
from tests.hostile.vm_flood import KVM_CREATE_VM, open_flood

BIRTHS_WANTED = 2000


@contextmanager
def open_births() -> Iterator[list[int]]:
    """Make and close VMs in this process all the time; gives how many there were."""
    births, ended = [0], threading.Event()
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)

    def make() -> None:
        while not ended.is_set():
            held = [fcntl.ioctl(kvm, KVM_CREATE_VM, 0) for _ in range(10)]
            births[0] += len(held)
            ended.wait(0.02)
            for vm in held:
                os.close(vm)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield births
    finally:
        ended.set()
        thread.join()
        os.close(kvm)


def read_resident_kb(pid: int) -> int:
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0])


def test_births_and_deaths_leave_nothing_behind(tell: Callable[[str], None]) -> None:
    with open_agent() as agent, open_flood(1, 3, 65534):
        for _ in range(20):
            agent.get()
        with open_births() as births:
            while births[0] < BIRTHS_WANTED:
                assert agent.get()[0] == 200
            fds, resident, lines = len(agent.fds()), read_resident_kb(agent.pid), len(agent.log)
            while births[0] < 2 * BIRTHS_WANTED:
                assert agent.get()[0] == 200
        agent.get()
        errors = agent.samples("kvm_exporter_read_errors_total", kind="duplicate")
        grown = read_resident_kb(agent.pid) - resident
        tell(
            f"{births[0]:,} VMs born and gone: {len(agent.fds()) - fds} fds and {grown} kB more in the second half, "
            f"{sum(errors.values()):.0f} conflicts counted"
        )
        assert sum(errors.values()) <= 2
        assert len(agent.fds()) <= fds + 2
        assert len(agent.log) <= lines + 3
        assert grown < 1.5 * BIRTHS_WANTED + 2000
