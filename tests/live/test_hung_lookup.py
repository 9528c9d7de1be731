"""A VM whose manager's files hang in the kernel: it delays no other VM, and not the agent's end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.agents import open_agent
from tests.live import hung_fuse, open_guest_process
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root to mount"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="this kernel has no FUSE"),
]
# A VM in a container, whose /run/libvirt/qemu never answers.
CONTAINER = (
    "mount -t tmpfs -o mode=0755 tmpfs /run && mkdir -p /run/libvirt/qemu && "
    f'{sys.executable} {hung_fuse.__file__} /run/libvirt/qemu && exec "$@"'
)
PREFIX = ("unshare", "--mount", "--propagation=private", "sh", "-c", CONTAINER, "sh")


def is_hung(process: psutil.Process) -> bool:
    """Whether it waits in the kernel for an answer of FUSE."""
    try:
        return "request_wait_answer" in Path(f"/proc/{process.pid}/wchan").read_text()
    except FileNotFoundError:
        return False


def find_hung(pid: int) -> list[psutil.Process]:
    return list(filter(is_hung, psutil.Process(pid).children()))


def find_named(samples: dict[tuple[tuple[str, str], ...], float]) -> set[str]:
    return {dict(labels)["name"] for labels in samples}


def test_the_agent_ends_though_a_lookup_hangs_in_the_kernel(tell: Callable[[str], None]) -> None:
    with (
        open_guest_process(name="hung", port_writes=1, prefix=PREFIX),
        open_guest_process(name="web", port_writes=1),
        open_agent() as agent,
    ):
        wait_until(lambda: find_hung(agent.pid), "a lookup hangs", 60)
        (hung, *_) = find_hung(agent.pid)
        assert "web" in find_named(agent.samples("kvm_vm_info"))
        began = time.monotonic()
        assert agent.close() == 0
        seconds = time.monotonic() - began
        # Not by its seconds, which are those of a busy machine: it has not waited for what no SIGKILL ends.
        assert is_hung(hung)
    psutil.wait_procs([hung], timeout=30)
    assert not hung.is_running()
    tell(f"SIGTERM while a lookup hangs in the kernel: the agent has ended after {seconds:.2f} s")
