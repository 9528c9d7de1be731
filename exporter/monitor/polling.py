"""When the whole host is read, and what that tells: which VMs there are, and whose counters have moved.

Only VMs whose counter can move need polling: not where the host does not support notify exits, nor VMs that have them
switched off. Where that is not known they can. While a trigger tells of notify exits they are polled all the same, but
slowly: a function that the kernel does not call for all of them (Linux 7.3 has a second one, for TDs) tells of nothing,
and looks just like a host on which nothing happens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, NamedTuple

from exporter.history.changes import CounterChanges, Moved
from exporter.monitor.backends import PollMode, Run
from kvm.model import Protection, Snapshot, SnapshotReader, VmKey, VmReading

POLL_SECONDS: Final = 1.0
POLLED_VCPUS: Final = 1000
# A poll that somebody wants out of turn comes so long after the last one.
POLL_GAP_SECONDS: Final = 0.5
# So often VMs are looked for, and polled, where notify exits are supported and nothing suggests that one is taken.
IDLE_SECONDS: Final = 10.0
# Where KVM is not loaded it may be, any time, and its first VM may be one that hangs.
ABSENT_SECONDS: Final = 4.0
# What a host does not support it may support after a module is loaded.
RETRY_SECONDS: Final = 300.0
_NEVER: Final = float("inf")


class Polling(NamedTuple):
    """How long until the next poll, and the period if anything needs polling, else 0."""

    delay_seconds: float
    period_seconds: float


def choose_polling(snapshot: Snapshot, always: bool, triggered: bool = False) -> Polling:
    """Choose when to poll next: all VMs where ``always``, slowly where a trigger tells of what happens."""
    can_move = [
        reading.vcpu_count or 1
        for reading in snapshot.readings
        if always or reading.protection in (Protection.ARMED, Protection.UNKNOWN)
    ]
    if can_move or always:
        period = POLL_SECONDS * max(1.0, sum(can_move) / POLLED_VCPUS)
        if triggered and not always:
            period = max(period, IDLE_SECONDS)
        return Polling(period, period)
    if not snapshot.host.kvm_module:
        return Polling(ABSENT_SECONDS, 0.0)
    return Polling(RETRY_SECONDS if snapshot.host.notify_supported is False else IDLE_SECONDS, 0.0)


@dataclass(frozen=True, slots=True)
class Poll:
    """One reading of the whole host, with the counters that have moved since the one before."""

    began: float
    ended: float
    snapshot: Snapshot
    moved: tuple[Moved, ...]


class Poller:
    """Reads the host when that is due: soon where it is ``wanted``, ever later while it fails."""

    def __init__(self, reader: SnapshotReader, mode: PollMode, run: Run) -> None:
        self.wanted = True
        self.readings: dict[VmKey, VmReading] = {}
        """The VMs of the newest snapshot."""
        self.vcpu_count = 0
        self._reader, self._mode, self._run = reader, mode, run
        self._counters = CounterChanges()
        self._polling = Polling(POLL_SECONDS, 0.0)
        self._at = -_NEVER
        self._pause = 0.0

    @property
    def period_seconds(self) -> float:
        """How often counters are polled; 0 where nothing needs that."""
        return self._polling.period_seconds

    @property
    def failing(self) -> bool:
        """Whether the last poll has failed."""
        return self._pause > 0

    def find_next(self, at_most: float) -> float:
        """Return when the next poll is due, ``at_most`` so many seconds after the last one."""
        if self._pause:
            return self._at + self._pause
        if self.wanted:
            return self._at + POLL_GAP_SECONDS
        return self._at + min(self._polling.delay_seconds, at_most)

    async def poll(self, triggered: bool) -> Poll:
        """Read the host; ``triggered`` says that a trigger tells of all notify exits. Raises what the reader raises."""
        clock = asyncio.get_running_loop().time
        began = self._at = clock()
        self.wanted = False
        # It has failed until it has ended.
        self._pause = min(max(2 * self._pause, POLL_SECONDS), IDLE_SECONDS)
        snapshot = await self._run(self._reader.read)
        self.readings = {reading.vm.key: reading for reading in snapshot.readings}
        self.vcpu_count = sum(len(reading.vcpus) for reading in snapshot.readings)
        always = self._mode is PollMode.ALWAYS
        self._polling = choose_polling(snapshot, always, triggered)
        poll = Poll(began, clock(), snapshot, tuple(self._counters.observe(snapshot)))
        self._at, self._pause = poll.ended, 0.0
        return poll
