"""Pidfds of VMs: the end of a process is told at once, and each pidfd is closed once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.holds import Holds, open_vm_process
from kvm.model import VmGone, VmKey
from kvm.processes import read_stat
from tests.virtual_time import run_inline

PROC = Path("/proc")


def open_sleeper() -> tuple[subprocess.Popen[bytes], VmKey]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    return process, VmKey(process.pid, read_stat(PROC, process.pid).start_ticks, 9)


def play(act: Callable[[Holds, list[VmKey]], object], open_pidfd: Callable[[VmKey], int] | None) -> list[VmKey]:
    """Hold and release; returns whose end was told."""
    ended: list[VmKey] = []

    async def main() -> None:
        holds = Holds(open_pidfd, run_inline, ended.append)
        act(holds, ended)
        await asyncio.sleep(0.05)
        for _ in range(500):
            if ended:
                break
            await asyncio.sleep(0.01)
        for key in ended:
            holds.release(key)
        await holds.close()

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == before
    return list(dict.fromkeys(ended))


def test_the_end_of_a_process_is_told() -> None:
    process, key = open_sleeper()

    def act(holds: Holds, ended: list[VmKey]) -> None:
        holds.hold(key)
        holds.hold(key)
        asyncio.get_running_loop().call_later(0.1, process.kill)

    assert play(act, open_vm_process) == [key]
    process.communicate()


def test_one_that_has_ended_already_is_told_too() -> None:
    process, key = open_sleeper()
    process.communicate(b"\n")
    assert play(lambda holds, ended: holds.hold(key), open_vm_process) == [key]
    with pytest.raises(VmGone):
        open_vm_process(key)


def test_one_that_is_released_at_once_is_closed_when_it_comes() -> None:
    process, key = open_sleeper()

    def act(holds: Holds, ended: list[VmKey]) -> None:
        holds.hold(key)
        holds.release(key)
        ended.append(key)

    assert play(act, open_vm_process) == [key]
    process.communicate(b"\n")


def test_without_fds_left_it_goes_on() -> None:
    def refuse(key: VmKey) -> int:
        raise OSError(24, "Too many open files")

    def act(holds: Holds, ended: list[VmKey]) -> None:
        holds.hold(VmKey(1, 2, 3))
        asyncio.get_running_loop().call_later(0.05, ended.append, VmKey(0, 0, 0))

    assert play(act, refuse) == [VmKey(0, 0, 0)]


def test_made_up_vms_are_not_held() -> None:
    def act(holds: Holds, ended: list[VmKey]) -> None:
        holds.hold(VmKey(1, 2, 3))
        ended.append(VmKey(0, 0, 0))

    assert play(act, None) == [VmKey(0, 0, 0)]
