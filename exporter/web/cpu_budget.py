"""Bounds the CPU time that strangers' questions may cost."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """A share of a core, and some more after a pause; what was spent beyond it has to come back first."""

    def __init__(self, share: float, burst_seconds: float, clock: Callable[[], float]) -> None:
        self._share, self._burst_seconds, self._clock = share, burst_seconds, clock
        self._left_seconds, self._at = burst_seconds, clock()

    @property
    def is_left(self) -> bool:
        """Whether there is anything left to spend."""
        now = self._clock()
        self._left_seconds = min(self._burst_seconds, self._left_seconds + (now - self._at) * self._share)
        self._at = now
        return self._left_seconds > 0

    def spend(self, seconds: float) -> None:
        """Take in that so much of a CPU's time was spent."""
        self._left_seconds -= seconds
