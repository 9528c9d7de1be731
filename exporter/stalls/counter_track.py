"""One vCPU's counter of notify exits: what it was, when it moved, and how fast it moves; pure.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from typing import Final

from exporter.stalls.interval import IntervalEstimator

# A counter that stands still for so long, and for three of its intervals, has stopped.
STILL_SECONDS: Final = 3.0
STILL_INTERVALS: Final = 3


class CounterTrack:
    """The counter since ``since``; ``value`` is None until it has been read, ``moved_seconds`` until it has moved.

    ``was_reset`` tells whether, at the newest reading, it had begun again from 0.
    """

    def __init__(self, since: float) -> None:
        self.value: int | None = None
        self.was_reset = False
        self.moved_seconds: float | None = None
        self.interval = IntervalEstimator()
        self._since = self._read_seconds = since

    def is_late(self, began: float) -> bool:
        """Tell whether a reading that began then is older than the newest one, and was handed over late."""
        return self.value is not None and began < self._read_seconds

    def observe(self, ended: float, value: int) -> int | None:
        """Take in a reading that ended then; returns by how much the counter has moved, None at the first."""
        before = self.value
        self.value, self._read_seconds = value, ended
        self.was_reset = before is not None and value < before
        by = None if before is None else value if self.was_reset else value - before
        self.interval.observe_reading(ended, 0 if self.was_reset or by is None else by)
        return by

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
