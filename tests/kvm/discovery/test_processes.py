"""A process is held as the one that it is, however its number is used again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvm.discovery.processes import is_thread_of, open_vm_process, read_stat
from kvm.errors import VmGone
from kvm.model import VmKey
from tests.exporter.monitor.test_process_watcher import PROC


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        yield running
        running.communicate(b"\n")


def test_a_process_is_held_as_the_one_that_it_is(process: subprocess.Popen[bytes]) -> None:
    ticks = read_stat(PROC, process.pid).start_ticks
    assert is_thread_of(process.pid, process.pid)
    assert not is_thread_of(process.pid, 1)
    with pytest.raises(VmGone, match="is another one by now"):
        open_vm_process(VmKey(process.pid, ticks + 1, 9))
