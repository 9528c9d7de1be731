"""Pidfds of VMs: the end of a process is told at once, and each pidfd is closed once."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from exporter.monitor.process_watcher import ProcessWatcher
from kvm.discovery.processes import open_vm_process, read_stat
from kvm.errors import MalformedData, VmGone
from kvm.model import VmKey
from tests.virtual_time import run_inline

T = TypeVar("T")

PROC = Path("/proc")


def open_sleeper() -> tuple[subprocess.Popen[bytes], VmKey]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    return process, VmKey(process.pid, read_stat(PROC, process.pid).start_ticks, 9)


def play(
    act: Callable[[ProcessWatcher, list[VmKey]], object], open_pidfd: Callable[[VmKey], int] | None
) -> list[VmKey]:
    """Hold and release; returns whose end was told."""
    ended: list[VmKey] = []

    async def main() -> None:
        watcher = ProcessWatcher(open_pidfd, run_inline, ended.append)
        act(watcher, ended)
        await asyncio.sleep(0.05)
        for _ in range(500):
            if ended:
                break
            await asyncio.sleep(0.01)
        for key in ended:
            watcher.release(key)
        await watcher.close()

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == before
    return list(dict.fromkeys(ended))


def test_the_end_of_a_process_is_told() -> None:
    process, key = open_sleeper()

    def act(watcher: ProcessWatcher, ended: list[VmKey]) -> None:
        watcher.watch(key)
        watcher.watch(key)
        asyncio.get_running_loop().call_later(0.1, process.kill)

    assert play(act, open_vm_process) == [key]
    process.communicate()


def test_one_that_has_ended_already_is_told_too() -> None:
    process, key = open_sleeper()
    process.communicate(b"\n")
    assert play(lambda watcher, ended: watcher.watch(key), open_vm_process) == [key]
    with pytest.raises(VmGone):
        open_vm_process(key)


def test_one_that_is_released_at_once_is_closed_when_it_comes() -> None:
    process, key = open_sleeper()

    def act(watcher: ProcessWatcher, ended: list[VmKey]) -> None:
        watcher.watch(key)
        watcher.release(key)
        ended.append(key)

    assert play(act, open_vm_process) == [key]
    process.communicate(b"\n")


def test_without_fds_left_it_goes_on() -> None:
    def refuse(key: VmKey) -> int:
        raise OSError(24, "Too many open files")

    def act(watcher: ProcessWatcher, ended: list[VmKey]) -> None:
        watcher.watch(VmKey(1, 2, 3))
        asyncio.get_running_loop().call_later(0.05, ended.append, VmKey(0, 0, 0))

    assert play(act, refuse) == [VmKey(0, 0, 0)]


def test_only_a_process_that_has_ended_is_gone(tmp_path: Path) -> None:
    process, key = open_sleeper()
    before = set(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(pidfd := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (pidfd + 1, limits[1]))  # enough for the pidfd, not for its stat
    try:
        with pytest.raises(OSError, match="Too many open files"):
            open_vm_process(key)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (tmp_path / str(key.pid)).mkdir()
    with pytest.raises(VmGone):
        open_vm_process(key, tmp_path)
    (tmp_path / str(key.pid) / "stat").write_text("nonsense")
    with pytest.raises(MalformedData):
        open_vm_process(key, tmp_path)
    with pytest.raises(VmGone, match="another one by now"):
        open_vm_process(key._replace(start_ticks=key.start_ticks - 1))
    assert set(os.listdir("/proc/self/fd")) == before
    process.communicate(b"\n")


@pytest.mark.parametrize("is_held_again", [False, True])
def test_one_that_is_released_while_it_is_opened_leaves_no_fd(is_held_again: bool) -> None:
    process, key = open_sleeper()

    async def main() -> None:
        ready = asyncio.Event()

        async def open_later(call: Callable[[], T]) -> T:
            await ready.wait()
            return call()

        before = len(os.listdir("/proc/self/fd"))
        watcher = ProcessWatcher(open_vm_process, open_later, lambda key: None)
        watcher.watch(key)
        await asyncio.sleep(0)
        watcher.release(key)
        if is_held_again:
            watcher.watch(key)
        ready.set()
        await asyncio.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) == before + is_held_again
        await watcher.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())
    process.communicate(b"\n")


def test_a_process_that_cannot_be_told_is_not_gone(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(key: VmKey) -> int:
        raise MalformedData("/proc/1/stat", "no start time")

    def act(watcher: ProcessWatcher, ended: list[VmKey]) -> None:
        watcher.watch(VmKey(1, 2, 3))
        asyncio.get_running_loop().call_later(0.05, ended.append, VmKey(0, 0, 0))

    assert play(act, refuse) == [VmKey(0, 0, 0)]
    assert "a VM's end cannot be waited for" in caplog.text


def test_made_up_vms_are_not_held() -> None:
    def act(watcher: ProcessWatcher, ended: list[VmKey]) -> None:
        watcher.watch(VmKey(1, 2, 3))
        ended.append(VmKey(0, 0, 0))

    assert play(act, None) == [VmKey(0, 0, 0)]
