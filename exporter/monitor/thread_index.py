"""Finds the vCPU whose thread the trigger names, among those of the newest snapshot.

A thread that is not there may belong to a VM that has come since, so its call waits for the next snapshot. If that does
not have it either, the thread is a stranger: its calls are ignored for a while, or one thread could have the host read
all the time. Calls that lead to no vCPU are counted as lost.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvm.bpf.notify_trigger import NotifyCall
from kvm.model import Snapshot, Vcpu, VmKey, VmReading

UNPLACED_CALLS: Final = 64
STRANGER_SECONDS: Final = 30.0


class Found(NamedTuple):
    """A vCPU of the newest snapshot."""

    reading: VmReading
    vcpu: Vcpu


class ThreadIndex:
    """The vCPU threads of the newest snapshot, and the calls of threads that it does not have."""

    def __init__(self) -> None:
        self.lost = 0
        self.is_same = False
        """Whether the newest snapshot has just the vCPUs that the one before had."""
        self._vcpus: list[tuple[VmKey, tuple[Vcpu, ...]]] = []
        self._readings: dict[int, list[VmReading]] = {}
        # By process, then by thread and vcpu_id; made for a process when it is first asked for.
        self._threads: dict[int, dict[tuple[int | None, int], Found]] = {}
        # By process, thread and vcpu_id: the calls that wait, and until when a thread is a stranger.
        self._waiting: dict[tuple[int, int, int], NotifyCall] = {}
        self._strangers: dict[tuple[int, int, int], float] = {}

    def find(self, call: NotifyCall) -> Found | None:
        """Find the vCPU of a call, None where the newest snapshot does not have it."""
        threads = self._threads.get(call.pid)
        if threads is None:
            threads = self._threads[call.pid] = {
                (vcpu.tid, vcpu.vcpu_id): Found(reading, vcpu)
                for reading in self._readings.get(call.pid, ())
                for vcpu in reading.vcpus
            }
        return threads.get((call.tid, call.vcpu_id))

    def defer(self, call: NotifyCall, now: float) -> bool:
        """Keep a call for the next snapshot; tells whether it is worth one."""
        thread = call[1:]
        if thread not in self._waiting:
            if len(self._waiting) >= UNPLACED_CALLS or now < self._strangers.get(thread, now):
                self.lost += 1
                return False
            self._waiting[thread] = call
        return True

    def observe(self, snapshot: Snapshot, now: float) -> list[Found]:
        """Take in a snapshot; returns the vCPUs of the calls that waited for it."""
        before, self._vcpus = self._vcpus, [(reading.vm.key, reading.vcpus) for reading in snapshot.readings]
        self.is_same = self._vcpus == before
        self._readings, self._threads = {}, {}
        for reading in snapshot.readings:
            self._readings.setdefault(reading.vm.key.pid, []).append(reading)
        self._strangers = {thread: until for thread, until in self._strangers.items() if now < until}
        waiting, self._waiting = self._waiting, {}
        found = {thread: self.find(call) for thread, call in waiting.items()}
        strangers = {thread: now + STRANGER_SECONDS for thread, place in found.items() if place is None}
        self._strangers |= strangers
        self.lost += len(strangers)
        return [place for place in found.values() if place is not None]
