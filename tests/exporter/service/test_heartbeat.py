from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.history.recorder import SnapshotRecorder
from exporter.service.heartbeat import OLD_SECONDS, STUCK_SECONDS, Heartbeat, describe_state
from exporter.service.manager import ServiceManager
from exporter.stalls.verdicts import MonitorReport, State
from kvm.model import Snapshot, SourceReport
from tests.exporter.service.listening_manager import open_manager
from tests.reports import make_report, with_figures
from tests.snapshots import HIDDEN, UP, make_reading, make_snapshot, make_unread
from tests.waiting import wait_until

NOW = 100.0


def describe(snapshot: Snapshot | None, states: Sequence[State] = (), problem: str = "", later: float = 0.0) -> str:
    vcpus = tuple(make_report(state, vcpu=number) for number, state in enumerate(states))
    now = later + (snapshot.monotonic_seconds if snapshot else 0.0)
    return describe_state(snapshot, with_figures(MonitorReport(vcpus=vcpus, problem=problem)), now)


def test_what_is_the_matter_is_said_in_a_line() -> None:
    host = make_snapshot(make_reading(), make_reading(pid=5))
    assert describe(None) == "the host has not been read yet"
    assert describe(make_snapshot(make_reading())) == "1 VM"
    assert describe(host) == "2 VMs"
    assert describe(host, [State.STALLED, State.QUIET, State.PROGRESSING]) == "2 VMs, 1 stalled"
    states = [State.CONTEXT_LOST, State.STALLED, State.STALLED, State.SUSPECT, State.UNKNOWN]
    assert describe(host, states) == "2 VMs, 1 without a context, 2 stalled, 1 suspect, 1 not judged"
    assert describe(host, problem="tracefs is closed") == "2 VMs, stalls are not detected"
    assert describe(make_snapshot(make_reading(), make_unread())) == "2 VMs, 1 whose notify exits are not known"
    incomplete = make_snapshot(make_reading(), blind_spots=HIDDEN)
    assert describe(incomplete) == "1 VM, others may be missing"
    assert describe(host, later=OLD_SECONDS + 1) == "2 VMs; 331 s ago"


def test_what_was_not_read_or_judged_is_not_left_out() -> None:
    host = make_snapshot(make_reading())
    assert describe_state(host, MonitorReport(), NOW, has_failed=True).startswith("blind: the host cannot be read")
    assert describe_state(None, MonitorReport(), NOW, has_failed=True).startswith("blind: the host cannot be read")
    assert (
        describe(make_snapshot(make_reading(), replace(make_reading(pid=5), vcpu_count=3)))
        == "2 VMs, 1 whose notify exits are not known"
    )
    assert describe(make_snapshot(sources=(replace(UP, up=False),))) == "0 VMs, no source works"
    states = (State.NOTIFYING, State.QUIET, State.STALLED)
    vcpus = [replace(make_report(state, vcpu=number), can_judge=False) for number, state in enumerate(states)]
    report = with_figures(MonitorReport(vcpus=tuple(vcpus)))
    assert describe_state(host, report, NOW) == "1 VM, 1 stalled, 1 not judged"


def test_who_the_vms_are_is_not_said() -> None:
    assert "web" not in describe(make_snapshot(make_reading("web")), [State.STALLED])


def test_a_drill_is_no_stall() -> None:
    drill = replace(make_report(State.STALLED), drill=True)
    assert describe_state(make_snapshot(make_reading()), with_figures(MonitorReport(vcpus=(drill,))), NOW) == "1 VM"


def test_a_blind_agent_says_why() -> None:
    down = SourceReport("bpf", up=False, reason="no capability")
    text = describe(make_snapshot(blind_spots=HIDDEN, sources=(down,)))
    assert text == "blind: /proc hides process 1"
    assert describe(make_snapshot(make_unread(), sources=(down,))).startswith("blind: no source works")


def test_signs_of_life_come_while_nothing_is_stuck() -> None:
    clock, begin = [1000.0], [None, 1000.0]
    with open_manager() as listening, ServiceManager(listening.address, 60.0) as manager:
        heartbeat = Heartbeat(manager, lambda: "2 VMs", [lambda: begin[0], lambda: begin[1]], lambda: clock[0])
        heartbeat.beat()
        assert [listening.take(), listening.take()] == [{"STATUS": "2 VMs"}, {"WATCHDOG": "1"}]
        clock[0] += STUCK_SECONDS - 1
        heartbeat.beat()
        assert listening.take_waiting() == [{"WATCHDOG": "1"}]
        clock[0] += 1
        heartbeat.beat()
        assert listening.take_waiting() == [{"STATUS": "stuck for 120 s, 2 VMs"}]
        begin[1] = None
        heartbeat.beat()
        assert listening.take_waiting() == [{"STATUS": "2 VMs"}, {"WATCHDOG": "1"}]


def test_a_state_that_cannot_be_told_is_not_told_and_no_hang(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise LookupError("no such state")

    with open_manager() as listening, ServiceManager(listening.address, 60.0) as manager:
        Heartbeat(manager, fail, []).beat()
        assert listening.take_waiting() == [{"STATUS": "the state of the host is not known"}, {"WATCHDOG": "1"}]
    assert [record.message for record in caplog.records] == ["the state of the host is not told"]


def test_where_no_watchdog_waits_only_the_state_is_told() -> None:
    with open_manager() as listening, ServiceManager(listening.address) as manager:
        Heartbeat(manager, lambda: "2 VMs", []).beat()
        assert listening.take_waiting() == [{"STATUS": "2 VMs"}]


def test_a_state_that_could_not_be_sent_is_sent_with_the_next_sign(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with ServiceManager(address) as manager:
        heartbeat = Heartbeat(manager, lambda: "blind", [])
        heartbeat.beat()  # there is no such socket yet
        with open_manager(address) as listening:
            heartbeat.beat()
            heartbeat.beat()
            assert listening.take_waiting() == [{"STATUS": "blind"}]


def test_an_event_loop_that_hangs_gives_no_sign() -> None:
    with open_manager() as listening, ServiceManager(listening.address, 0.06) as manager:
        hangs, go_on = threading.Event(), threading.Event()

        async def main() -> None:
            beating = asyncio.create_task(Heartbeat(manager, lambda: "2 VMs", []).run())
            while len(listening.told) < 3:
                await asyncio.to_thread(listening.take)
            listening.take_waiting()
            hangs.set()
            go_on.wait()  # blocks the loop
            beating.cancel()

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert hangs.wait(30)
        thread.join(0.5)
        assert thread.is_alive()
        assert listening.take_waiting() == []
        go_on.set()
        thread.join()


def test_where_nobody_listens_there_is_nothing_to_do() -> None:
    asyncio.run(asyncio.wait_for(Heartbeat(ServiceManager(), lambda: "2 VMs", []).run(), 30))


class HungHost:
    """A host whose snapshot does not end until it may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def read(self) -> Snapshot:
        self.may_end.wait()
        return make_snapshot(make_reading())

    def close(self) -> None:
        return


def test_the_recorder_says_since_when_a_snapshot_is_under_way() -> None:
    host = HungHost()
    recorder = SnapshotRecorder(host, lambda: 7.0)
    assert recorder.reading_since is None
    threads = [threading.Thread(target=recorder.read) for _ in range(2)]  # one reads, one waits for it
    for thread in threads:
        thread.start()
    wait_until(lambda: recorder.reading_since == 7.0)
    host.may_end.set()
    for thread in threads:
        thread.join()
    assert recorder.reading_since is None


class FailingOnce:
    """A host that cannot be read the second time."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> Snapshot:
        self.reads += 1
        if self.reads == 2:
            raise OSError("no such host")
        return make_snapshot(make_reading())

    def close(self) -> None:
        return


def test_the_recorder_says_whether_the_last_reading_has_failed() -> None:
    recorder = SnapshotRecorder(FailingOnce())
    recorder.read()
    assert not recorder.has_failed
    with pytest.raises(OSError, match="no such host"):
        recorder.read()
    assert recorder.has_failed
    assert recorder.snapshot is not None
    recorder.read()
    assert not recorder.has_failed
