"""Which vCPU it was: finds the threads that the trigger tells of among those of the last look at the host.

A thread that is not there may belong to a VM that has come since, so it waits for the next look. One that is not in
that either is a stranger: for a while nobody looks for it again, lest one thread have the host looked at all the time.
Calls that lead to no vCPU are counted as lost.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvm.bpf.notify_trigger import NotifyCall
from kvm.model import Snapshot, Vcpu, VmReading

UNPLACED_CALLS: Final = 64
STRANGER_SECONDS: Final = 30.0


class Found(NamedTuple):
    """A vCPU of the last look."""

    reading: VmReading
    vcpu: Vcpu


class ThreadIndex:
    """The vCPU threads of the last look, and those that have been asked for and are not among them."""

    def __init__(self) -> None:
        self.lost = 0
        self._snapshot: Snapshot | None = None
        self._by_pid: dict[int, list[VmReading]] = {}
        # By process, thread and vcpu_id: what has been called from there, and until when it is a stranger.
        self._waiting: dict[tuple[int, int, int], NotifyCall] = {}
        self._strangers: dict[tuple[int, int, int], float] = {}

    def find(self, call: NotifyCall) -> Found | None:
        """Find the vCPU of a call, None where the last look has not seen it."""
        if not self._by_pid and self._snapshot is not None:
            for reading in self._snapshot.readings:
                self._by_pid.setdefault(reading.vm.key.pid, []).append(reading)
        for reading in self._by_pid.get(call.pid, ()):
            for vcpu in reading.vcpus:
                if (vcpu.tid, vcpu.vcpu_id) == (call.tid, call.vcpu_id):
                    return Found(reading, vcpu)
        return None

    def deferred_reason(self, call: NotifyCall, now: float) -> bool:
        """Keep a call for the next look; tells whether it is worth one."""
        thread = call[1:]
        if thread not in self._waiting:
            if len(self._waiting) >= UNPLACED_CALLS or now < self._strangers.get(thread, now):
                self.lost += 1
                return False
            self._waiting[thread] = call
        return True

    def observe(self, snapshot: Snapshot, now: float) -> list[Found]:
        """Take in a look; returns the vCPUs of the calls that have waited for it."""
        self._snapshot, self._by_pid = snapshot, {}
        self._strangers = {thread: until for thread, until in self._strangers.items() if now < until}
        waiting, self._waiting = self._waiting, {}
        found = {thread: self.find(call) for thread, call in waiting.items()}
        strangers = {thread: now + STRANGER_SECONDS for thread, place in found.items() if place is None}
        self._strangers |= strangers
        self.lost += len(strangers)
        return [place for place in found.values() if place is not None]
