"""The flags of the watch, and what it is wired to."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping

import pytest

from exporter.cli import parse_command_line
from exporter.monitor.backends import PollMode
from exporter.monitor.process_watcher import is_thread_of, open_vm_process
from exporter.wiring import SharedReader, make_vcpu_reader
from kvm.bpf.notify_trigger import FUNCTION
from kvm.bpf.vcpu_decode import VcpuState
from kvm.discovery.processes import read_stat
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Snapshot, SourceUnavailable, VmGone, VmKey
from tests.snapshots import make_snapshot
from tests.test_holds import PROC
from tests.waiting import wait_until

KEY = VmKey(1, 2, 3)


def test_what_a_stall_is_and_how_it_is_found_can_be_chosen() -> None:
    arguments = parse_command_line(["--stall.exits=20", "--stall.seconds=2.5", "--poll=always", "--no-trigger.bpf"])
    assert (arguments.stall_exits, arguments.stall_seconds) == (20, 2.5)
    assert (arguments.poll, arguments.trigger_bpf) == (PollMode.ALWAYS, False)
    defaults = parse_command_line([])
    assert (defaults.stall_exits, defaults.stall_seconds, defaults.poll) == (10, 1.0, PollMode.AUTO)
    assert (defaults.trigger_bpf, defaults.trigger_function) == (True, FUNCTION)


@pytest.mark.parametrize(
    "words",
    [
        ["--stall.exits=1"],
        ["--stall.exits=ten"],
        ["--stall.seconds=-1"],
        ["--stall.seconds=nan"],
        ["--stall.seconds=inf"],
        ["--poll=never"],
        ["drill"],
        ["demo", "--no-trigger.bpf"],
        ["once", "--poll=always"],
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_command_line(words)
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


def make_state(statistics: Mapping[str, tuple[int, ...]]) -> VcpuState:
    return VcpuState(7, 70, {"rax": 1, "rip": 2, "rsp": 3}, frozenset({"rip", "rsp"}), statistics)


def test_registers_that_are_stale_are_left_out() -> None:
    counts = {NOTIFY_WINDOW_EXITS: (5,), EXITS: (9,)}
    reading = make_vcpu_reader(lambda key, vcpu_id: make_state(counts | {"guest_mode": (1,)}))(KEY, 7)
    assert reading is not None
    assert (dict(reading.registers), reading.nested) == ({"rax": 1}, True)
    assert (reading.notify_exits, reading.exits) == (5, 9)
    unknown = make_vcpu_reader(lambda key, vcpu_id: make_state(counts))(KEY, 7)
    assert unknown is not None
    assert unknown.nested is None


def test_a_vcpu_that_is_gone_is_none_and_one_without_statistics_is_no_zero() -> None:
    assert make_vcpu_reader(lambda key, vcpu_id: None)(KEY, 7) is None
    with pytest.raises(SourceUnavailable):
        make_vcpu_reader(lambda key, vcpu_id: make_state({}))(KEY, 7)


class Slow:
    def __init__(self) -> None:
        self.inside = self.most = 0
        self.gate = threading.Event()

    def read(self) -> Snapshot:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.gate.wait(10)
        self.inside -= 1
        return make_snapshot()

    def close(self) -> None:
        """Nothing to give back."""


def test_looks_take_turns() -> None:
    slow = Slow()
    shared = SharedReader(slow)
    threads = [threading.Thread(target=shared.read) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: slow.inside == 1)
    slow.gate.set()
    for thread in threads:
        thread.join()
    assert slow.most == 1
    shared.close()


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
