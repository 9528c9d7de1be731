"""Perf events on the kernel that runs. kvm:kvm_exit may never fire here, so records are those of another tracepoint.

raw_syscalls:sys_enter serves: what a record says is what a thread of ours asks for, as often as it asks.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psutil
import pytest

from kvm.errors import VmGone
from kvm.perf import event as perf_event
from kvm.perf.notify_records import TraceRecords, build_mask_filter
from kvm.perf.notify_tracer import NotifyTracer
from kvm.perf.ring import Sample
from kvm.perf.tracefs import open_tracefs, read_tracepoint
from tests.live import open_guest_process
from tests.own_mounts import UNMOUNT_ALL

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
TRACEFS = Path("/sys/kernel/tracing")
ENABLE = TRACEFS / "events/kvm/kvm_exit/enable"
# No system call has these numbers; the kernel answers ENOSYS, and the tracepoint has them all the same.
FIRST, SECOND = 3000, 3001
FIRST_ONLY = f"id == {FIRST}"
WAIT_MS = 10_000


def find_perf_fds() -> list[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the fd of the listing itself
    return [name for name in names if "perf_event" in name]


def count_perf_maps() -> int:
    return Path("/proc/self/maps").read_text().count("[perf_event]")


class Caller:
    """A thread that makes system calls when told to."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._libc = ctypes.CDLL(None)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        self.tid = self._done.get()

    def _serve(self) -> None:
        self._done.put(threading.get_native_id())
        while numbers := self._work.get():
            for number in numbers:
                self._libc.syscall(ctypes.c_long(number), ctypes.c_long(-1))
            self._done.put(len(numbers))

    def start(self, *numbers: int) -> None:
        self._work.put(list(numbers))

    def wait(self) -> None:
        self._done.get()

    def call(self, *numbers: int) -> None:
        self.start(*numbers)
        self.wait()

    def end(self) -> None:
        self._work.put([])
        self.thread.join()


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    if caller.thread.is_alive():
        caller.end()


@pytest.fixture
def tracer() -> Iterator[NotifyTracer]:
    tracer = NotifyTracer()
    tracer.open()
    yield tracer
    tracer.close()


class Event:
    """An event of sys_enter with its ring."""

    def __init__(self, tid: int, event_filter: str, pages: int) -> None:
        self.tracepoint = read_tracepoint(TRACEFS, "raw_syscalls", "sys_enter")
        self.fd = perf_event.open_event(self.tracepoint.id, tid, event_filter)
        self.id = perf_event.read_event_id(self.fd)
        self.ring = perf_event.Ring(self.fd, pages)

    def decode(self, samples: tuple[Sample, ...]) -> list[int]:
        return [self.tracepoint.decode(sample.raw, ["id"])[0] for sample in samples]

    def read(self) -> list[int]:
        samples, lost, odd = self.ring.read()
        assert (lost, odd) == (0, 0)
        return self.decode(samples)

    def close(self) -> None:
        self.ring.close()
        os.close(self.fd)


@contextmanager
def open_sys_enter(tid: int, event_filter: str = f"id >= {FIRST}", pages: int = 8) -> Iterator[Event]:
    with closing(Event(tid, event_filter, pages)) as event:
        yield event


def test_records_arrive_complete_in_order_and_in_time(caller: Caller) -> None:
    with open_sys_enter(caller.tid) as event:
        perf_event.allow_records(event.fd, 1000)
        began = time.monotonic_ns()
        caller.call(FIRST, SECOND, FIRST)
        ended = time.monotonic_ns()
        samples = event.ring.read().samples
        assert event.decode(samples) == [FIRST, SECOND, FIRST]
        assert {sample.event_id for sample in samples} == {event.id}
        assert began < samples[0].time_ns < samples[1].time_ns < samples[2].time_ns < ended
        assert event.ring.read() == ((), 0, 0)


def test_nothing_comes_before_the_event_is_let_go(caller: Caller) -> None:
    with open_sys_enter(caller.tid) as event:
        caller.call(FIRST, SECOND)
        assert perf_event.read_count(event.fd) == 0
        perf_event.allow_records(event.fd, 1000)
        caller.call(SECOND)
        assert event.read() == [SECOND]


def test_the_filter_holds_from_the_first_record_on(caller: Caller) -> None:
    """The thread makes calls that the filter drops all the while."""
    for _ in range(50):
        caller.start(*[SECOND] * 200, FIRST)
        with open_sys_enter(caller.tid, FIRST_ONLY) as event:
            perf_event.allow_records(event.fd, 1000)
            caller.wait()
            assert set(event.read()) <= {FIRST}


def test_other_threads_leave_no_records(caller: Caller) -> None:
    other = Caller()
    with open_sys_enter(caller.tid) as event:
        perf_event.allow_records(event.fd, 1000)
        other.call(FIRST)
        other.end()
        assert event.read() == []


def test_a_mask_filter_means_in_the_kernel_what_it_says(caller: Caller) -> None:
    """The filter of notify exits, on a field that can be given any value: 75 with any bits above the lowest 16."""
    passing = [75 | high << 16 for high in (0, 1, 1 << 10, 1 << 11, 0xC00, 0x3FFF)]
    dropped = [75 ^ 1 << bit | 1 << 26 for bit in range(16)]  # numbers of no system call
    with open_sys_enter(caller.tid, build_mask_filter("id", 75, 0xFFFF)) as event:
        perf_event.allow_records(event.fd, 1000)
        caller.call(*passing, *dropped, *reversed(passing))  # 75 itself is fdatasync(-1)
        assert event.read() == [*passing, *reversed(passing)]


@pytest.mark.parametrize("allowance", [1, 64])
def test_the_kernel_stops_at_the_allowance_and_a_new_event_goes_on(caller: Caller, allowance: int) -> None:
    """The same event may not be let go again: since Linux 6.17 it stays stopped."""
    with open_sys_enter(caller.tid) as event, ExitStack() as stack:
        perf_event.allow_records(event.fd, allowance)
        caller.call(*[FIRST] * 1000)
        assert event.read() == [FIRST] * allowance
        for _ in range(3):
            next_fd = perf_event.open_event(event.tracepoint.id, caller.tid, FIRST_ONLY)
            stack.callback(os.close, next_fd)
            perf_event.redirect_records(next_fd, event.fd)
            perf_event.allow_records(next_fd, allowance)
            caller.call(*[FIRST] * 1000)
            assert event.read() == [FIRST] * allowance


def test_nothing_waits_without_a_wake_up(caller: Caller) -> None:
    """As an event loop reads: wait, look whether the thread has ended, read. A lost wake-up would be waited for."""
    total = 20_000
    with open_sys_enter(caller.tid, pages=1024) as event, select.epoll() as loop:
        loop.register(event.fd, select.EPOLLIN)
        perf_event.allow_records(event.fd, total + 1)
        caller.start(*[FIRST] * total)
        seen = wakes = 0
        while seen < total:
            assert loop.poll(WAIT_MS / 1000), f"records wait without a wake-up, after {seen}"
            assert not perf_event.has_exited(event.fd)
            seen, wakes = seen + len(event.read()), wakes + 1
        caller.wait()
        assert (seen, perf_event.read_count(event.fd)) == (total, total)
        print(f"{total} records in {wakes} wake-ups")


def test_a_full_ring_keeps_the_oldest_and_counts_the_rest(caller: Caller) -> None:
    with open_sys_enter(caller.tid, pages=1) as event:
        perf_event.allow_records(event.fd, 5000)
        caller.call(*[FIRST] * 10, *[SECOND] * 990)
        first = event.ring.read()
        assert event.decode(first.samples)[:11] == [FIRST] * 10 + [SECOND]
        caller.call(FIRST)
        second = event.ring.read()
        assert event.decode(second.samples) == [FIRST]
        assert len(first.samples) + 1 + second.lost == 1001


def test_two_events_write_to_one_ring(caller: Caller) -> None:
    with open_sys_enter(caller.tid, FIRST_ONLY) as event, ExitStack() as stack:
        second = perf_event.open_event(event.tracepoint.id, caller.tid, f"id == {SECOND}")
        stack.callback(os.close, second)
        perf_event.redirect_records(second, event.fd)
        perf_event.allow_records(event.fd, 64)
        perf_event.allow_records(second, 1)
        caller.call(FIRST, SECOND, SECOND, FIRST)
        samples = event.ring.read().samples
        other = perf_event.read_event_id(second)
        assert [sample.event_id for sample in samples] == [event.id, other, event.id]
        assert (perf_event.read_count(event.fd), perf_event.read_count(second)) == (2, 1)


def test_a_thread_that_ends_while_armed(caller: Caller) -> None:
    with open_sys_enter(caller.tid) as event:
        perf_event.allow_records(event.fd, 64)
        caller.call(FIRST)
        assert not perf_event.has_exited(event.fd)
        caller.end()
        waiter = select.poll()
        waiter.register(event.fd, 0)
        assert waiter.poll(WAIT_MS), "the kernel does not tell"
        assert perf_event.has_exited(event.fd)
        assert event.read() == [FIRST]
        perf_event.allow_records(event.fd, 64)
        with pytest.raises(ProcessLookupError):
            perf_event.open_event(event.tracepoint.id, caller.tid)


def test_arming_leaves_nothing_behind(tracer: NotifyTracer) -> None:
    """With the filters that it uses: that the kernel takes them is half of what is shown here."""
    before = psutil.Process().num_fds()
    with open_guest_process() as guest:
        fds = psutil.Process().num_fds()
        armed = tracer.arm(guest.vcpus[0].tid)
        armed.watch_other_rips(2**64 - 1)
        armed.watch_other_rips(0x10000)
        assert (len(find_perf_fds()), count_perf_maps()) == (3, 1)  # A, its ring's own copy of the fd, B
        assert ENABLE.read_text() == "0\n"
        assert armed.read() == TraceRecords()
        armed.refresh()
        armed.disarm()
        armed.disarm()
        assert (find_perf_fds(), count_perf_maps()) == ([], 0)
        assert psutil.Process().num_fds() == fds
        assert armed.read() == TraceRecords(ended=True)
    assert psutil.Process().num_fds() == before
    assert ENABLE.read_text() == "0\n"


def test_a_thread_is_armed_and_disarmed_a_hundred_times_while_it_is_read(tracer: NotifyTracer, caller: Caller) -> None:
    """From several threads: reading meets every state of arming, watching and disarming."""
    tracer.hold_warm()
    for _ in range(100):
        armed = tracer.arm(caller.tid)
        worker = threading.Thread(target=armed.disarm)
        watcher = threading.Thread(target=watch_unless_gone, args=[armed.watch_other_rips])
        watcher.start()
        worker.start()
        while not armed.read().ended:
            armed.refresh()
        worker.join()
        watcher.join()
    tracer.release_warm()
    assert (find_perf_fds(), count_perf_maps()) == ([], 0)


def watch_unless_gone(watch: Callable[[int], None]) -> None:
    try:
        watch(0x10000)
    except VmGone:
        return  # disarmed before


def test_a_dying_guest_is_noticed(tracer: NotifyTracer) -> None:
    with open_guest_process() as guest:
        armed = tracer.arm(guest.vcpus[0].tid)
        waiter = select.poll()
        waiter.register(armed.fd, select.POLLIN)
        guest.process.kill()
        assert waiter.poll(WAIT_MS)
        guest.process.wait()
        assert armed.read() == TraceRecords(ended=True, gone=True)
        with pytest.raises(VmGone):
            armed.watch_other_rips(0x10000)
        with pytest.raises(VmGone, match=f"thread {armed.tid} has ended"):
            tracer.arm(armed.tid)
        armed.disarm()
    assert find_perf_fds() == []


def start_caller_with(tid: int) -> Caller:
    """A new thread with the number of one that has ended: the kernel gives the next number after ns_last_pid."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(tid - 1))
        caller = Caller()
        if caller.tid == tid:
            return caller
        caller.end()
    raise AssertionError(f"somebody else always takes the number {tid}")


def test_a_thread_number_that_is_used_again_is_not_taken_for_the_old_thread(
    tracer: NotifyTracer, caller: Caller
) -> None:
    armed = tracer.arm(caller.tid)
    caller.end()
    other = start_caller_with(armed.tid)
    assert armed.read() == TraceRecords(ended=True, gone=True)
    with pytest.raises(VmGone, match="has ended"):
        armed.watch_other_rips(0x10000)
    assert len(find_perf_fds()) == 2
    armed.disarm()
    other.end()


def test_what_is_held_warm(tracer: NotifyTracer) -> None:
    tracer.hold_warm()
    tracer.hold_warm()
    assert (len(find_perf_fds()), count_perf_maps()) == (1, 0)
    tracer.close()
    tracer.close()
    assert find_perf_fds() == []


def test_what_it_costs(tracer: NotifyTracer, caller: Caller) -> None:
    disarms = {}
    for state in ("cold", "warm"):
        if state == "warm":
            tracer.hold_warm()
        marks = [time.perf_counter()]
        armed = tracer.arm(caller.tid)
        for step in (lambda one=armed: one.watch_other_rips(1), armed.read, armed.disarm):
            marks.append(time.perf_counter())
            step()
        marks.append(time.perf_counter())
        took = [(end - begin) * 1000 for begin, end in itertools.pairwise(marks)]
        print(f"{os.uname().release} {state}: arm %.2f ms, watch %.2f ms, read %.3f ms, disarm %.2f ms" % tuple(took))
        disarms[state] = took[-1]
    assert disarms["warm"] < disarms["cold"]


OPEN = """
from kvm.errors import SourceUnavailable
from kvm.perf.notify_tracer import NotifyTracer
tracer = NotifyTracer()
try:
    tracer.open()
    print("open", "private" if tracer.tracefs.is_private else tracer.tracefs.path)
except SourceUnavailable as err:
    print("SourceUnavailable", err)
"""


def open_elsewhere(*command: str) -> str:
    """What opening a tracer says in a process that a command starts."""
    done = subprocess.run([*command, sys.executable, "-c", OPEN], cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def test_without_the_capability() -> None:
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) < 0:
        pytest.skip("kernel.perf_event_paranoid allows everything to everybody")
    said = open_elsewhere("setpriv", "--bounding-set=-perfmon,-sys_admin")
    assert said.startswith("SourceUnavailable missing capability: CAP_PERFMON")


def test_without_rights_at_all() -> None:
    said = open_elsewhere("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert said.startswith("SourceUnavailable /sys/kernel/tracing: Permission denied")
    assert "CAP_DAC_READ_SEARCH" in said


UNMOUNT = "umount -l /sys/kernel/debug/tracing; umount -l /sys/kernel/tracing; "


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("umount -l /sys/kernel/tracing; ", "open /sys/kernel/debug/tracing"),
        (UNMOUNT + "umount -l /sys/kernel/debug; mount -t tracefs none /mnt; ", "open /mnt"),
        (UNMOUNT + "umount -l /sys/kernel/debug; ", "open private"),
    ],
)
def test_tracefs_in_unusual_places(prepare: str, said: str) -> None:
    words = ["unshare", "--mount", "sh", "-c", prepare + 'exec "$@"', "sh"]
    assert open_elsewhere(*words).startswith(said)


BARE = """
import os, threading
from pathlib import Path
from kvm.perf.notify_tracer import NotifyTracer
mountinfo = Path("/proc/self/mountinfo")
before, mounts = mountinfo.read_text(), Path("/proc/mounts").read_text()
assert not any(line.split()[2] in ("tracefs", "debugfs", "securityfs", "bpf") for line in mounts.splitlines())
ready, end, tids = threading.Event(), threading.Event(), []
thread = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), ready.set(), end.wait()))
thread.start()
ready.wait()
tracer = NotifyTracer()
tracer.open()
armed = tracer.arm(tids[0])
armed.watch_other_rips(0x10000)
print(os.readlink(f"/proc/self/fd/{armed.fd}"), tracer.tracefs.is_private, armed.read().ended)
armed.disarm()
tracer.close()
end.set()
print(mountinfo.read_text() == before, sorted(os.listdir("/proc/self/fd")))
"""


def test_where_nothing_is_mounted_a_thread_is_armed_and_no_mount_appears() -> None:
    words = ["unshare", "--mount", "sh", "-c", f'{UNMOUNT_ALL}; exec "$@"', "sh", sys.executable, "-c", BARE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    said = ["anon_inode:[perf_event] True False", "True ['0', '1', '2', '3']"]  # 3 lists the fds
    assert done.stdout.splitlines() == said, done.stderr


def test_tracefs_is_where_it_usually_is() -> None:
    found = open_tracefs(TRACEFS)
    assert (found.path, found.is_private) == (TRACEFS, False)
