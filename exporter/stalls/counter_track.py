"""One vCPU's counter of notify exits: what it was, when it moved, and how fast it moves; pure.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from exporter.stalls.interval import IntervalEstimator

# A counter that stands still for so long, and for three of its intervals, has stopped.
STILL_SECONDS: Final = 3.0
STILL_INTERVALS: Final = 3


class Movement(NamedTuple):
    """By how much the counter has moved since the reading before, and whether it began again from 0."""

    by: int
    was_reset: bool


class CounterTrack:
    """The counter since ``since``; ``value`` is None until it has been read, ``moved_seconds`` until it has moved."""

    def __init__(self, since: float) -> None:
        self.value: int | None = None
        self.moved_seconds: float | None = None
        self.interval = IntervalEstimator()
        self._since = self._read_seconds = since

    def is_late(self, began: float) -> bool:
        """Tell whether a reading that began then is older than the newest one, and was handed over late."""
        return self.value is not None and began < self._read_seconds

    def observe(self, ended: float, value: int) -> Movement | None:
        """Take in a reading that ended then; returns None for the first."""
        before = self.value
        self.value, self._read_seconds = value, ended
        was_reset = before is not None and value < before
        by = 0 if before is None else value if was_reset else value - before
        self.interval.observe_reading(ended, 0 if was_reset else by)
        return None if before is None else Movement(by, was_reset)

    @property
    def still_limit_seconds(self) -> float:
        """How long the counter may stand still before it counts as stopped."""
        return max(STILL_SECONDS, STILL_INTERVALS * (self.interval.interval_seconds or 0.0))

    def find_still(self, now: float) -> float:
        """Return for how long the counter is not known to have moved."""
        return now - (self._since if self.moved_seconds is None else self.moved_seconds)

    def find_unread(self, now: float, seen_seconds: float) -> float:
        """Return for how long nothing is known of the counter; a notify exit was seen otherwise at ``seen_seconds``."""
        return now - max(self._read_seconds, seen_seconds, self.moved_seconds or self._read_seconds)
