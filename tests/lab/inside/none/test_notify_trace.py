"""The tracer on kernels where kvm:kvm_exit fires, with notify exits made to measure by the injector."""

from __future__ import annotations

import contextlib
import os
import select
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvm.errors import VmGone
from kvm.model import NotifyExit
from kvm.perf.notify_records import TraceRecords
from kvm.perf.notify_tracer import SESSION_RECORDS, ArmedThread, NotifyTracer
from tests.lab.inside.kvm_readers import find_vm_directory, read_vcpu_statistics
from tests.live import GuestProcess, open_guest_process
from tests.waiting import wait_until

COUNT_IN_RCX, FROM_ENCLAVE = 2, 8
CONTEXT_INVALID, UNBLOCKED_NMI = 1, 0x1000
ALIGNMENT_CHECK_LOOP = 0x80000B11
WAIT_SECONDS = 60.0

pytestmark = pytest.mark.usefixtures("injector")


@contextmanager
def open_tracer(*, allowance: int = SESSION_RECORDS, pages: int | None = None) -> Iterator[NotifyTracer]:
    tracer = NotifyTracer(allowance=allowance, pages=pages)
    tracer.open()
    yield tracer
    tracer.close()


@contextmanager
def open_armed(tracer: NotifyTracer, tid: int) -> Iterator[ArmedThread]:
    armed = tracer.arm(tid)
    yield armed
    armed.disarm()


@pytest.fixture
def tracer() -> Iterator[NotifyTracer]:
    with open_tracer() as opened:
        yield opened


@pytest.fixture
def armed(tracer: NotifyTracer, guest: GuestProcess) -> Iterator[ArmedThread]:
    """The guest's vCPU 0 is armed."""
    with open_armed(tracer, guest.vcpus[0].tid) as one:
        yield one


def read_statistic(guest: GuestProcess, name: str, index: int = 0) -> int:
    return read_vcpu_statistics(guest, guest.vcpus[index])[name]


def wait_for_record(armed: ArmedThread) -> TraceRecords:
    """Waits as an event loop does, then reads."""
    waiter = select.poll()
    waiter.register(armed.fd, select.POLLIN)
    assert waiter.poll(WAIT_SECONDS * 1000), "nothing came within a minute"
    return armed.read()


def read_kvm_users() -> int:
    """How many hold the module kvm; an event of its tracepoints is one of them."""
    return int(Path("/sys/module/kvm/refcnt").read_text(encoding="ascii"))


def count_perf_fds() -> int:
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if Path(entry.path).is_symlink()]
    return sum("perf_event" in link for link in links)


def count_perf_maps() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("[perf_event]")


def test_a_thousand_notify_exits_are_a_thousand_records(guest: GuestProcess) -> None:
    before = read_statistic(guest, "notify_window_exits")
    tid = guest.vcpus[0].tid
    with open_tracer(allowance=2000) as tracer, open_armed(tracer, tid) as armed:
        began_ns = time.monotonic_ns()
        guest.notify(0, exits=1000, qualification=UNBLOCKED_NMI, vectoring=ALIGNMENT_CHECK_LOOP)
        done = guest.wait_for("done")
        ended_ns = time.monotonic_ns()
        records = armed.read()
    assert (records.lost, records.odd, records.ended, records.gone) == (0, 0, False, False)
    times = [record.time_ns for record in records.exits]
    expected = [NotifyExit(at, tid, done["code"], UNBLOCKED_NMI, ALIGNMENT_CHECK_LOOP) for at in times]
    assert list(records.exits) == expected
    assert len(expected) == read_statistic(guest, "notify_window_exits") - before == 1000
    assert times == sorted(times)
    assert began_ns < times[0] < times[-1] < ended_ns


def test_the_kernel_stops_after_the_allowance_until_it_is_refreshed(armed: ArmedThread, guest: GuestProcess) -> None:
    before = read_statistic(guest, "notify_window_exits")
    for _ in range(5):
        guest.notify(0, exits=1000)
        guest.wait_for("done")
        records = armed.read()
        assert (len(records.exits), records.lost, records.odd) == (SESSION_RECORDS, 0, 0)
        assert (records.ended, records.gone) == (True, False)
        armed.refresh()
    assert read_statistic(guest, "notify_window_exits") - before == 5000
    assert armed.read() == TraceRecords()


def test_an_allowance_that_is_not_used_up_stays_as_it_is(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, exits=10)
    guest.wait_for("done")
    assert len(armed.read().exits) == 10
    for _ in range(3):
        armed.refresh()
    guest.notify(0, exits=1000)
    guest.wait_for("done")
    assert len(armed.read().exits) == SESSION_RECORDS - 10


def test_changing_rips(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, rips=4, rounds=10)
    done = guest.wait_for("done")
    assert [(record.rip or 0) - done["code"] for record in armed.read().exits] == [0, 2, 4, 6] * 10


def test_a_rip_of_0_is_a_rip(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, exits=3, code=0)
    assert guest.wait_for("done")["code"] == 0
    assert [record.rip for record in armed.read().exits] == [0] * 3


def test_a_rip_is_not_known_in_an_enclave(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, exits=3, flags=FROM_ENCLAVE)
    guest.wait_for("done")
    assert [record.rip for record in armed.read().exits] == [None] * 3


def test_an_invalid_context(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, qualification=CONTEXT_INVALID)
    guest.wait_for("done")
    (record,) = armed.read().exits
    assert record.qualification & CONTEXT_INVALID


def test_other_exits_leave_no_records(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.run(500)
    assert armed.read() == TraceRecords()


def test_two_threads_at_once(tracer: NotifyTracer, guest: GuestProcess) -> None:
    first, second = (vcpu.tid for vcpu in guest.vcpus)
    with open_armed(tracer, first) as one, open_armed(tracer, second) as two:
        guest.notify(0, exits=7)
        guest.notify(1, exits=5)
        codes = {done["vcpu"]: done["code"] for done in (guest.wait_for("done"), guest.wait_for("done"))}
        assert [(record.tid, record.rip) for record in one.read().exits] == [(first, codes[0])] * 7
        assert [(record.tid, record.rip) for record in two.read().exits] == [(second, codes[1])] * 5


def test_another_rip_is_silent_on_a_stuck_guest_and_fires_when_it_goes_on(
    armed: ArmedThread, guest: GuestProcess
) -> None:
    """Ticks of the host hit the stuck guest meanwhile: each is an exit, at the same RIP."""
    guest.notify(0, exits=0)
    rip = wait_for_record(armed).exits[0].rip
    assert rip is not None
    armed.watch_other_rips(rip)
    names = ("irq_exits", "notify_window_exits", "exits")
    before = {name: read_statistic(guest, name) for name in names}
    wait_until(lambda: read_statistic(guest, "irq_exits") >= before["irq_exits"] + 50, "50 interrupts", WAIT_SECONDS)
    moved = {name: read_statistic(guest, name) - before[name] for name in names}
    assert not armed.read().other_rip
    print(f"silent through {moved}")
    guest.stop()
    guest.wait_for("done")
    guest.run(1)  # one port write where the guest was stuck, then hlt behind it
    assert armed.read().other_rip
    assert armed.read().other_rip, "it stays"


def test_another_rip_wakes_the_reader_although_the_allowance_is_used_up(
    armed: ArmedThread, guest: GuestProcess
) -> None:
    guest.notify(0, exits=1000)
    rip = guest.wait_for("done")["code"]
    assert armed.read().ended
    armed.watch_other_rips(rip)
    guest.run(1)
    records = wait_for_record(armed)
    assert (records.exits, records.other_rip, records.ended) == ((), True, True)


def test_a_new_watch_forgets_the_old_one(armed: ArmedThread, guest: GuestProcess) -> None:
    armed.watch_other_rips(0x123)
    guest.notify(0, exits=2)
    done = guest.wait_for("done")
    armed.watch_other_rips(done["code"])  # the record of the first one is in the ring, unread
    records = armed.read()
    assert (len(records.exits), records.other_rip) == (2, False)
    guest.run(1)
    assert armed.read().other_rip


def test_a_rep_at_one_rip_is_no_other_rip_until_it_is_over(armed: ArmedThread, guest: GuestProcess) -> None:
    guest.notify(0, flags=COUNT_IN_RCX, rcx=10)
    code = guest.wait_for("done")["code"]
    armed.read()
    armed.watch_other_rips(code)
    guest.notify(0, flags=COUNT_IN_RCX, rcx=10**9)
    start = read_statistic(guest, "notify_window_exits")
    wait_until(
        lambda: read_statistic(guest, "notify_window_exits") > start + 1000, "a thousand notify exits", WAIT_SECONDS
    )
    assert not armed.read().other_rip
    guest.stop()
    guest.wait_for("done")


def test_records_that_find_the_ring_full_are_counted(guest: GuestProcess) -> None:
    with open_tracer(allowance=5000, pages=1) as tracer, open_armed(tracer, guest.vcpus[0].tid) as armed:
        guest.notify(0, exits=1000)
        rip = guest.wait_for("done")["code"]
        first = armed.read()
        guest.notify(0, exits=1)  # what was lost is told with the next record that finds room
        guest.wait_for("done")
        second = armed.read()
        assert 20 < len(first.exits) < 100
        assert first.lost == 0
        assert (len(second.exits), second.odd) == (1, 0)
        assert len(first.exits) + len(second.exits) + second.lost == 1001
        assert {record.rip for record in (*first.exits, *second.exits)} == {rip}


def test_an_allowance_is_used_up_although_its_last_records_are_lost(guest: GuestProcess) -> None:
    with open_tracer(allowance=200, pages=1) as tracer, open_armed(tracer, guest.vcpus[0].tid) as armed:
        guest.notify(0, exits=1000)
        guest.wait_for("done")
        first = armed.read()
        assert 20 < len(first.exits) < 100
        assert (first.lost, first.ended) == (0, False)
        assert armed.read() == TraceRecords(ended=True)
        armed.refresh()
        assert armed.read() == TraceRecords()
        guest.notify(0, exits=1)
        guest.wait_for("done")
        assert len(first.exits) + armed.read().lost == 200


def test_another_rip_is_known_even_where_its_record_is_lost(guest: GuestProcess) -> None:
    with open_tracer(allowance=5000, pages=1) as tracer, open_armed(tracer, guest.vcpus[0].tid) as armed:
        guest.notify(0, exits=1)
        rip = guest.wait_for("done")["code"]
        armed.read()
        armed.watch_other_rips(rip)
        guest.notify(0, exits=1000)  # the hlt behind it is at another RIP
        guest.wait_for("done")
        armed.read()
        guest.notify(0, exits=1)
        guest.wait_for("done")
        records = armed.read()
        assert records.lost > 0
        assert records.other_rip


def test_a_guest_that_dies_while_armed(tracer: NotifyTracer) -> None:
    with open_guest_process(stats_fds=True) as guest:
        directory = find_vm_directory(guest)
        armed = tracer.arm(guest.vcpus[0].tid)
        guest.notify(0, exits=0)
        rip = wait_for_record(armed).exits[0].rip
        assert rip is not None
        guest.process.kill()
        guest.process.wait()
        wait_until(lambda: not directory.exists(), "the end of the VM, although it is traced", WAIT_SECONDS)
        wait_until(lambda: armed.read().gone, "news of the thread's end", WAIT_SECONDS)
        assert armed.read() == TraceRecords(ended=True, gone=True)
        with contextlib.suppress(VmGone):  # raised if the thread had used up what it may make
            armed.refresh()
        with pytest.raises(VmGone):
            armed.watch_other_rips(rip)
        with pytest.raises(VmGone):
            tracer.arm(armed.tid)
        armed.disarm()
    assert count_perf_fds() == 0


def test_nothing_is_left(tracer: NotifyTracer, guest: GuestProcess) -> None:
    """perf's hold on a tracepoint shows as a hold on its module; tracefs must never say that it is enabled."""
    enable = Path("/sys/kernel/tracing/events/kvm/kvm_exit/enable")
    users = read_kvm_users()
    armed = tracer.arm(guest.vcpus[0].tid)
    armed.watch_other_rips(0x10000)
    assert (count_perf_fds(), count_perf_maps(), read_kvm_users()) == (3, 1, users + 2)
    assert enable.read_text(encoding="ascii") == "0\n"
    guest.notify(0, exits=100)
    guest.wait_for("done")
    assert armed.read().exits
    armed.disarm()
    armed.disarm()
    assert (count_perf_fds(), count_perf_maps(), read_kvm_users()) == (0, 0, users)
    assert armed.read() == TraceRecords(other_rip=True, ended=True)
    with pytest.raises(VmGone, match="not armed any more"):
        armed.watch_other_rips(0x10000)
    tracer.hold_warm()
    tracer.hold_warm()
    assert (count_perf_fds(), count_perf_maps(), read_kvm_users()) == (1, 0, users + 1)
    guest.notify(0, exits=100)
    guest.wait_for("done")
    tracer.release_warm()
    tracer.release_warm()
    assert (count_perf_fds(), read_kvm_users()) == (0, users)
    assert enable.read_text(encoding="ascii") == "0\n"


def test_what_it_costs(tracer: NotifyTracer, guest: GuestProcess) -> None:
    """Under emulation everything is slow; what counts is that disarming does not wait while the tracepoint is warm."""
    medians: dict[str, dict[str, float]] = {}
    for state in ("cold", "warm"):
        seconds: dict[str, list[float]] = {"arm": [], "watch": [], "read": [], "disarm": []}
        if state == "warm":
            tracer.hold_warm()
        for _ in range(9):
            armed = tracer.arm(guest.vcpus[0].tid)
            armed.disarm()
            marks = [time.perf_counter()]
            armed = tracer.arm(guest.vcpus[0].tid)
            for step in (lambda one=armed: one.watch_other_rips(0x10000), armed.read, armed.disarm):
                marks.append(time.perf_counter())
                step()
            marks.append(time.perf_counter())
            for name, begin, end in zip(seconds, marks, marks[1:], strict=False):
                seconds[name].append(end - begin)
        medians[state] = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
    tracer.release_warm()
    for state, values in medians.items():
        print(f"{os.uname().release} {state}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in values.items()))
    assert medians["warm"]["disarm"] < medians["cold"]["disarm"]
