"""Which vCPUs' counters have moved from look to look, and how often to look.

Only VMs whose counter can move need polling: not where the host does not support notify exits, nor VMs that have them
switched off. Where that is not known they can.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvm.model import Protection, Snapshot

POLL_SECONDS: Final = 1.0
POLLED_VCPUS: Final = 1000
# A look at the host that somebody wants out of turn comes so long after the last one.
POLL_GAP_SECONDS: Final = 0.5
# New VMs are looked for so often where notify exits are supported and no VM has them armed.
IDLE_SECONDS: Final = 10.0
# What a host does not support it may support after a module is loaded.
RETRY_SECONDS: Final = 300.0


class Polling(NamedTuple):
    """How long until the next look, and the period if anything needs polling, else 0."""

    delay_seconds: float
    period_seconds: float


def choose_polling(snapshot: Snapshot, always: bool) -> Polling:
    """Choose when to look next, where nothing but looking tells of notify exits."""
    can_move = [
        reading.vcpu_count or 1
        for reading in snapshot.readings
        if always or reading.protection in (Protection.ARMED, Protection.UNKNOWN)
    ]
    if can_move or always:
        period = POLL_SECONDS * max(1.0, sum(can_move) / POLLED_VCPUS)
        return Polling(period, period)
    return Polling(RETRY_SECONDS if snapshot.host.notify_supported is False else IDLE_SECONDS, 0.0)


class PollTimes:
    """When the next look at the host is due; one that is ``wanted`` comes soon, one that fails is tried ever later."""

    def __init__(self) -> None:
        self.wanted = True
        self.polling = Polling(POLL_SECONDS, 0.0)
        self._at = float("-inf")
        self._pause = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last look has failed."""
        return self._pause > 0

    def begin(self, now: float) -> None:
        """Take in that a look begins: it has failed until it has ended."""
        self.wanted = False
        self._at = now
        self._pause = min(max(2 * self._pause, POLL_SECONDS), IDLE_SECONDS)

    def end(self, now: float) -> None:
        """Take in that a look has gone well."""
        self._at = now
        self._pause = 0.0

    def find_next(self, at_most: float) -> float:
        """Return when the next look is due, ``at_most`` so many seconds after the last one."""
        if self._pause:
            return self._at + self._pause
        if self.wanted:
            return self._at + POLL_GAP_SECONDS
        return self._at + min(self.polling.delay_seconds, at_most)
