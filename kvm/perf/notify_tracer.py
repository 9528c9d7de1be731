"""Reads the RIPs of notify exits: records of the tracepoint kvm:kvm_exit, of chosen vCPU threads, for a short while.

A counter says that a vCPU takes notify exits; only this tracepoint says where, because KVM's cached RIP is stale after
them. Two perf events are opened for one thread, never CPU-wide:

* the **notify event** takes notify exits: `NOTIFY_FILTER`, SESSION_RECORDS of them, then the kernel disables it;
* the **progress event** takes the first exit of any kind at another RIP than one that the notify event has seen: proof
  that the guest makes progress. Interrupts of the host that hit a stuck guest are exits at its own RIP and do not
  count, nor does anything else at that RIP.

Both write to one ring, so one fd wakes the reader for both, and the notify event cannot fill it before it is read.

An open event of kvm:kvm_exit makes the kernel build a record at every exit of that thread, and opening the first and
closing the last patches kernel text. Hence `NotifyTracer.hold_warm`: an event on ourselves, which never fires, keeps
the tracepoint in place for a while; other vCPUs' exits then pay a function call that returns at once. While any event
is open the module kvm cannot be unloaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from kvm.errors import KvmReadError, SourceUnavailable, VmGone
from kvm.host.private_mount import PrivateMount
from kvm.host.privileges import read_privileges
from kvm.model import NotifyExit
from kvm.perf import event as perf_event
from kvm.perf.notify_records import FIELDS, NOTIFY_FILTER, TraceRecords, decode_notify_exit
from kvm.perf.refusals import explain
from kvm.perf.ring import RingContents
from kvm.perf.tracefs import Tracefs, open_tracefs, read_tracepoint
from kvm.perf.tracepoint_format import Tracepoint

TRACEFS = Path("/sys/kernel/tracing")
SYSTEM, NAME = "kvm", "kvm_exit"
SESSION_RECORDS = 64


class _Role(Enum):
    """What an event of a thread is there for."""

    RING = "makes the first notify exits' records, and has the ring"
    EXITS = "makes those that were allowed later"
    OTHER_RIP = "makes one record of another RIP"


class _Event(NamedTuple):
    fd: int
    id: int


class ArmedThread:
    """One thread whose notify exits are traced; made by `NotifyTracer.arm`, ended by `disarm`.

    ``fd`` is readable when there is something to `read`, and stays so once the thread has exited: take it out of the
    event loop before `disarm`. `read` belongs in the event loop: where nothing has come it interrupts the thread's CPU
    to read a counter, and waits for nothing else. The others wait for the kernel and belong in worker threads. Any of
    them may run while another one does.
    """

    def __init__(
        self,
        tracepoint: Tracepoint,
        tid: int,
        *,
        allowance: int,
        pages: int,
        explain: Callable[[OSError, int], KvmReadError],
    ) -> None:
        """Arm the thread; raises OSError. ``explain`` makes of later ones what is raised then."""
        self.tid = tid
        self.fd = perf_event.open_event(tracepoint.id, tid, NOTIFY_FILTER)
        self._tracepoint, self._explain = tracepoint, explain
        self._lock = threading.Lock()  # held for moments only, so that `read` never waits
        self._ring: perf_event.Ring | None = None
        self._events = {_Role.RING: _Event(self.fd, -1)}
        self._other_seen = False
        # Of the notify event's records: how many it may make in all, and how many of those may be still to come.
        self._allowance = self._left = allowance
        try:
            self._ring = perf_event.Ring(self.fd, pages)
            self._exits = _Event(self.fd, perf_event.read_event_id(self.fd))
            self._exit_ids = {self._exits.id}
            perf_event.allow_records(self.fd, allowance)
        except BaseException:
            self.disarm()
            raise

    def read(self) -> TraceRecords:
        """Take what has come; after `disarm`, nothing."""
        with self._lock:
            if self._ring is None:
                return TraceRecords(other_rip=self._other_seen, ended=True)
            gone = perf_event.has_exited(self.fd)  # before reading the ring, see there
            samples, lost, odd = self._read_ring(self._ring)
            self._left -= lost + odd  # each may have been one of the notify event's
            other = self._events.get(_Role.OTHER_RIP)
            exits: list[NotifyExit] = []
            for sample in samples:
                if sample.event_id not in self._exit_ids:
                    # What a progress event of an earlier RIP has left says nothing about this one.
                    self._other_seen |= other is not None and sample.event_id == other.id
                    continue
                self._left -= sample.event_id == self._exits.id  # an earlier one's have come late
                decoded = decode_notify_exit(self._tracepoint, sample, self.tid)
                if decoded is None:
                    odd += 1
                else:
                    exits.append(decoded)
            if lost and other is not None and not self._other_seen:
                # The progress event's only record may be among those lost. Its counter is not.
                self._other_seen = bool(perf_event.read_count(other.fd))
            ended = gone or self._left <= 0
            return TraceRecords(tuple(exits), lost, odd, self._other_seen, ended, gone)

    def _read_ring(self, ring: perf_event.Ring) -> RingContents:
        contents = ring.read()
        if not any(contents) and self._left > 0 and (perf_event.read_count(self._exits.fd) or 0) >= self._allowance:
            contents = ring.read()  # what was counted stands there by now
            if not any(contents):
                # The last ones were lost. The kernel says so with its next record, and would make none.
                self._left = 0
        return contents

    def watch_other_rips(self, rip: int) -> None:
        """Arm the progress event: it takes any exit of the thread at another RIP. Waits for the kernel.

        Raises VmGone where the thread has exited or is disarmed, SourceUnavailable where the kernel refuses.
        """

        def start(event: _Event) -> bool:
            self._other_seen = False
            perf_event.allow_records(event.fd, 1)
            return True

        self._replace(_Role.OTHER_RIP, f"guest_rip != {rip:#x}", start)

    def refresh(self) -> None:
        """Allow as many records as at first, once those are used up and read; otherwise returns at once.

        So what is unread never exceeds one allowance, for which the ring has room. Waits for the kernel where the
        allowance is used up. Raises VmGone where the thread has exited, SourceUnavailable where the kernel refuses.
        """

        # A new event each time: since Linux kernel commit 18dbcbfabfff "perf: Fix the POLL_HUP delivery breakage" (in
        # v6.17) an event whose allowance is used up is also stopped, and perf_trace_add in
        # kernel/trace/trace_event_perf.c never starts it again. Before, it was switched off a moment late, and could
        # be so after it had been switched on again.
        def start(event: _Event) -> bool:
            if self._left > 0:
                return False  # another call was faster
            self._exit_ids.add(event.id)
            perf_event.allow_records(event.fd, self._allowance)
            self._exits, self._left = event, self._allowance
            return True

        with self._lock:
            if self._ring is None or self._left > 0:
                return
        self._replace(_Role.EXITS, NOTIFY_FILTER, start)

    def disarm(self) -> None:
        """Close everything, which may wait for a grace period; may be called twice."""
        with self._lock:
            events, self._events = self._events, {}
            ring, self._ring = self._ring, None
            self.fd = -1
        if ring is not None:
            ring.close()
        for role in (_Role.OTHER_RIP, _Role.EXITS, _Role.RING):
            if role in events:
                os.close(events[role].fd)

    def _replace(self, role: _Role, event_filter: str, start: Callable[[_Event], bool]) -> None:
        """Open an event that writes to the ring, and put it in the place of the role's earlier one.

        ``start`` lets it go, or says that it is not wanted after all.
        """
        unused = -1
        try:
            unused = fd = perf_event.open_event(self._tracepoint.id, self.tid, event_filter)
            event = _Event(fd, perf_event.read_event_id(fd))
            with self._lock:
                if self._ring is None:
                    raise VmGone(f"thread {self.tid} is not armed any more")
                perf_event.redirect_records(fd, self.fd)
                if start(event):
                    unused = self._events[role].fd if role in self._events else -1
                    self._events[role] = event
        except OSError as err:
            # Where the thread has ended and another one got its number, the kernel refuses to join their events.
            with self._lock:
                gone = self.fd >= 0 and perf_event.has_exited(self.fd)
            if gone:
                raise VmGone(f"thread {self.tid} has ended") from err
            raise self._explain(err, self.tid) from err
        finally:
            if unused >= 0:
                os.close(unused)


class NotifyTracer:
    """Arms threads; one for the agent.

    ``allowance`` is how many records a thread may make before `ArmedThread.refresh`; ``pages`` how many pages its ring
    has, None for as many as that takes. The attribute ``tracefs`` is what tracefs was found, None while not open. The
    methods may be called from several threads.
    """

    def __init__(
        self,
        tracefs: Path = TRACEFS,
        *,
        proc: Path = Path("/proc"),
        sysfs: Path = Path("/sys"),
        allowance: int = SESSION_RECORDS,
        pages: int | None = None,
        open_private: Callable[[str], PrivateMount] = PrivateMount,
    ) -> None:
        self._open_private = open_private
        self._preferred, self._proc, self._sysfs = tracefs, proc, sysfs
        self._allowance, self._pages = allowance, pages
        self.tracefs: Tracefs | None = None
        self._lock = threading.Lock()
        self._warm_fd = -1

    def open(self) -> None:
        """Find the tracepoint, and arm and disarm ourselves to see whether that is allowed. Waits for the kernel.

        May be called again to try again. Raises SourceUnavailable, which says what is missing.
        """
        self._close_tracefs()
        self.tracefs = open_tracefs(self._preferred, self._proc, self._sysfs, self._open_private)
        try:
            self.arm(os.getpid()).disarm()
        except BaseException:
            self._close_tracefs()
            raise

    def arm(self, tid: int) -> ArmedThread:
        """Trace the notify exits of one thread. Waits for the kernel: call it in a worker thread.

        The caller makes sure that ``tid`` is still the right thread, by its process's pidfd and /proc/PID/task
        afterwards: from then on the events hold on to the thread itself, whoever gets its number. Raises VmGone where
        there is no such thread, SourceUnavailable where the kernel refuses or `open` has not succeeded.
        """
        tracepoint = self._read_tracepoint()
        # Room for one record of the progress event, too, and for one that says how many were lost.
        pages = self._pages or perf_event.count_pages(tracepoint.size, self._allowance + 2)
        try:
            return ArmedThread(tracepoint, tid, allowance=self._allowance, pages=pages, explain=self._explain)
        except OSError as err:
            raise self._explain(err, tid) from err

    def hold_warm(self) -> None:
        """Keep the tracepoint in place, so that arming and disarming are quick, until `release_warm`.

        Waits for the kernel; may be called twice. Raises SourceUnavailable.
        """
        with self._lock:
            if self._warm_fd >= 0:
                return
            tracepoint = self._read_tracepoint()
            try:
                # Disabled, without records, on our main thread, which runs no vCPU.
                self._warm_fd = perf_event.open_event(tracepoint.id, os.getpid(), with_records=False)
            except OSError as err:
                raise self._explain(err, os.getpid()) from err

    def release_warm(self) -> None:
        """Let the tracepoint go, which may wait for a grace period; may be called twice."""
        with self._lock:
            fd, self._warm_fd = self._warm_fd, -1
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        """Give back what the tracer holds; armed threads are their owners' to disarm."""
        self.release_warm()
        self._close_tracefs()

    def _close_tracefs(self) -> None:
        tracefs, self.tracefs = self.tracefs, None
        if tracefs is not None:
            tracefs.close()

    def _explain(self, err: OSError, tid: int) -> KvmReadError:
        return explain(err, tid, read_privileges(self._proc, self._sysfs, self._open_private))

    def _read_tracepoint(self) -> Tracepoint:
        # Read each time: when the module kvm is loaded anew, its tracepoints get other numbers.
        if self.tracefs is None:
            raise SourceUnavailable("the tracer is not open")
        tracefs = self.tracefs.path
        try:
            tracepoint = read_tracepoint(tracefs, SYSTEM, NAME)
        except FileNotFoundError as err:
            reason = f"{tracefs} has no tracepoint {SYSTEM}:{NAME}: the module kvm is not loaded"
            raise SourceUnavailable(reason, "load kvm_intel or kvm_amd") from err
        if missing := tracepoint.find_missing(FIELDS):
            reason = f"the records of {SYSTEM}:{NAME} have no {', '.join(missing)} on this kernel"
            raise SourceUnavailable(reason, "please report this with the kernel's version")
        return tracepoint
