"""An agent that is killed at any moment: nothing of it is left in the kernel, and the next one takes its place."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

from tests.agents import ROOT, AgentProcess
from tests.live import open_guest_process
from tests.waiting import wait_until

KILLS = 10
# From before it loads its first program to after its first scrape.
LIFE_SECONDS = (0.3, 3.0)


def find_kernel_objects(pid: int) -> set[tuple[str, int]]:
    """The BPF programs, maps and links that a process holds, by kind and id (proc_pid_fdinfo(5))."""
    found = set[tuple[str, int]]()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = path.read_text()
        except OSError:  # it was closed meanwhile
            continue
        found |= {(kind, int(number)) for kind, number in re.findall(r"^(prog|map|link)_id:\s*(\d+)$", text, re.M)}
    return found


def is_there(kind: str, number: int) -> bool:
    """Whether the kernel still has it; asking holds it for a moment."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd: int = getattr(library, f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd < 0:
        assert -fd == errno.ENOENT, os.strerror(-fd)
        return False
    os.close(fd)
    return True


def has_ended(child: psutil.Process) -> bool:
    """Whether nothing keeps it but the kernel: one that looks up the owner of a hostile VM of another test may hang."""
    try:
        return child.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DISK_SLEEP)
    except psutil.NoSuchProcess:
        return True


def find_vms(pid: int) -> list[str]:
    """The VMs of a process, by KVM's own directory."""
    return [path.name for path in Path("/sys/kernel/debug/kvm").glob(f"{pid}-*")]


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


class Killed(NamedTuple):
    """What an agent had when it was killed."""

    objects: set[tuple[str, int]]
    children: list[psutil.Process]
    listened: bool


def kill(words: Sequence[str], path: str, seconds: float) -> Killed:
    """Run an agent for so long and kill it; wait until all that it had is gone."""
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        time.sleep(seconds)  # that is the attack
        children = psutil.Process(process.pid).children()
        objects, listened = find_kernel_objects(process.pid), listens(path)
        process.kill()
    wait_until(lambda: not any(is_there(*found) for found in objects), lambda: f"{objects} are gone")
    wait_until(lambda: all(map(has_ended, children)), lambda: f"{children} have ended")
    wait_until(lambda: not find_vms(process.pid), "its VM is gone")
    return Killed(objects, children, listened)


def test_an_agent_killed_at_any_moment_leaves_nothing_in_the_kernel(tell: Callable[[str], None]) -> None:
    chance = random.Random(17)
    with open_guest_process(name="web", stats_fds=True, port_writes=1), TemporaryDirectory() as directory:
        path = f"{directory}/agent.sock"
        words = [sys.executable, "-m", "exporter", "serve", f"--web.listen-address=unix:{path}"]
        killed = [kill(words, path, chance.uniform(*LIFE_SECONDS)) for _ in range(KILLS)]
        words.append("--web.listen-address=127.0.0.1:0")
        with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            agent = AgentProcess(process, path)
            agent.wait()
            assert 'name="web"' in agent.get_text("/metrics")
            assert agent.close() == 0
    objects, children, listened = (
        sum(len(one.objects) for one in killed),
        sum(len(one.children) for one in killed),
        sum(one.listened for one in killed),
    )
    tell(
        f"{KILLS} times kill -9, {listened} of them where it listened: {objects} BPF programs, maps and links and "
        f"{children} children that it had are gone"
    )
    assert objects
    assert children
    assert listened
