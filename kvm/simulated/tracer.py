"""Traces of the simulated host, as kvm.perf gives them of a real one: so a demo shows a stall from end to end.

The vCPU that gets stuck takes its notify exits at ``STUCK_RIP``; another vCPU takes each of its own somewhere else.
"""

from __future__ import annotations

import math
import os
from typing import Final

from kvm.errors import VmGone
from kvm.model import NotifyExit
from kvm.perf.notify_records import TraceRecords
from kvm.perf.notify_tracer import SESSION_RECORDS
from kvm.simulated.host import SimulatedHost, SimulatedVcpu

# Where Linux has its kernel's text, and a place in a user's program.
STUCK_RIP: Final = 0xFFFFFFFF81A0_4D10
RARE_RIP: Final = 0x5581_0000_1000
# IDT-vectoring information: valid, an error code, a hardware exception, vector 17 (SDM volume 3, section 25.9.3).
VECTORING_AC: Final = 0x8000_0B11


class SimulatedThread:
    """A simulated armed thread; its ``fd`` is never readable, so whoever waits for it calls ``read`` now and then."""

    def __init__(self, host: SimulatedHost, vcpu: SimulatedVcpu) -> None:
        self.tid = vcpu.tid
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._host, self._vcpu = host, vcpu
        self._made = vcpu.count(host.age_seconds())
        self._left = SESSION_RECORDS
        self._watched_since: float | None = None
        self._other_rip = False

    def read(self) -> TraceRecords:
        """Return the exits since the last read, as many as are allowed."""
        seconds = self._host.age_seconds()
        made = self._vcpu.count(seconds)
        first, self._made = self._made, made
        numbers = range(first, made)[: self._left]
        self._left -= len(numbers)
        if self._watched_since is not None and not self._vcpu.is_stuck(seconds):
            self._other_rip = True
        exits = tuple(self._make_exit(number, made, seconds) for number in numbers)
        return TraceRecords(exits, other_rip=self._other_rip, ended=not self._left)

    def watch_other_rips(self, rip: int) -> None:
        """Arm the progress event: a vCPU that is not stuck leaves the guest at many RIPs."""
        self._watched_since, self._other_rip = self._host.age_seconds(), False

    def refresh(self) -> None:
        """Allow as many records as at first."""
        if not self._left:
            self._left = SESSION_RECORDS

    def disarm(self) -> None:
        """Close the fd; may be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _make_exit(self, number: int, made: int, seconds: float) -> NotifyExit:
        age_seconds = self._vcpu.newest_exit_age_seconds(seconds) + (made - 1 - number) * self._vcpu.interval_seconds
        time_ns = round(self._host.find_time(seconds - age_seconds) * 1e9)
        if self._vcpu.gets_stuck:
            return NotifyExit(time_ns, self.tid, STUCK_RIP, 0, VECTORING_AC)
        return NotifyExit(time_ns, self.tid, RARE_RIP + 64 * math.floor(seconds), 0, 0)


class SimulatedTracer:
    """Arms simulated threads."""

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host

    def open(self) -> None:
        """Do nothing: there is nothing that could be missing."""

    def arm(self, tid: int) -> SimulatedThread:
        """Trace a simulated thread; raises VmGone where there is no such thread."""
        vcpu = self._host.find_thread(tid)
        if vcpu is None:
            raise VmGone(f"no simulated thread {tid}")
        return SimulatedThread(self._host, vcpu)

    def hold_warm(self) -> None:
        """Do nothing: no kernel text is patched."""

    def release_warm(self) -> None:
        """Do nothing, as well."""

    def close(self) -> None:
        """Do nothing: nothing is held."""
