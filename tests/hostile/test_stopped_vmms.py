"""VMMs that are stopped, and such that another process traces: they are shown, and no scrape waits for them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.agents import AgentProcess, open_agent
from tests.live import GuestProcess, open_guest_process
from tests.waiting import wait_until

# include/uapi/linux/ptrace.h
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
SCRAPE_SECONDS = 2.0
PORT_WRITES = 1000


@contextmanager
def stop(pid: int) -> Iterator[None]:
    """Stop a process inside the context, as Ctrl-Z does."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def trace(pid: int) -> Iterator[None]:
    """Hold a process inside the context, as a debugger does; a child of ours, by the thread that calls."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ptrace(request: int) -> None:
        if libc.ptrace(ctypes.c_long(request), pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")

    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        ptrace(PTRACE_DETACH)


def find_exits(agent: AgentProcess, guest: GuestProcess) -> list[float]:
    """The exits of each vCPU of a guest that is shown by its name; empty where it is not."""
    ids = [
        dict(labels)["vm"]
        for labels in agent.samples("kvm_vm_info")
        if dict(labels)["pid"] == str(guest.pid) and dict(labels)["name"] == "held"
    ]
    return list(agent.samples("kvm_vcpu_exits_total", vm=ids[0]).values()) if ids else []


@pytest.mark.parametrize("source", ["bpf", "stats_fd"])
@pytest.mark.parametrize("hold", [stop, trace])
def test_who_is_held_is_shown_and_holds_nobody_up(
    hold: Callable[[int], AbstractContextManager[None]], source: str, tell: Callable[[str], None]
) -> None:
    with open_guest_process(name="held", vcpus=2, stats_fds=True, port_writes=1) as guest:
        with hold(guest.pid), open_agent(f"--collector.source={source}") as agent:
            wait_until(lambda: len(find_exits(agent, guest)) == 2, "the VM is shown")
            before, seconds = find_exits(agent, guest), []
            for _ in range(10):
                began = time.perf_counter()
                assert agent.get()[0] == 200
                seconds.append(time.perf_counter() - began)
            assert find_exits(agent, guest) == before
            assert agent.samples("kvm_vcpu_no_forward_progress") == {}
        with open_agent(f"--collector.source={source}") as agent:
            guest.run(PORT_WRITES)
            after = find_exits(agent, guest)
    assert all(then >= now + PORT_WRITES for now, then in zip(before, after, strict=True))
    tell(f"a VMM held by {hold.__name__}, read by {source}: scrapes of {max(seconds):.2f} s at most")
    assert max(seconds) < SCRAPE_SECONDS
