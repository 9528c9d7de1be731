"""How long it takes from one notify exit of a vCPU to the next, as far as records and readings tell; pure.

Two records in a row tell it exactly. Two readings of the counter only say how many exits lie between them, not when:
they bound it, and move the estimate no further than into these bounds. So readings that happen to come close together,
or far apart, do not make a slow vCPU look fast, or a fast one slow.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from typing import Final

# The longest trace session there is: exits that come too slowly for it cannot be judged.
SESSION_SECONDS: Final = 5.0


class IntervalEstimator:
    """An estimate for one vCPU; ``interval_seconds`` is None while there is nothing to tell it from."""

    def __init__(self) -> None:
        self.interval_seconds: float | None = None
        self._paired = False
        self._read_seconds: float | None = None
        # The last two readings between which the counter moved.
        self._moved: tuple[float, float] | None = None

    def begin_session(self) -> None:
        """Say that the records to come are not in a row with those before."""
        self._paired = False

    def observe_pair(self, apart: float) -> None:
        """Take in how far apart two records in a row are; within a session, the closest two count."""
        self.interval_seconds = min(apart, self.interval_seconds or apart) if self._paired else apart
        self._paired = True

    def observe_reading(self, seconds: float, moved: int) -> None:
        """Take in a reading of the counter, and by how much it moved since the one before."""
        before, self._read_seconds = self._read_seconds, seconds
        if before is None or moved <= 0:
            return
        last, self._moved = self._moved, (before, seconds)
        if moved > 1:
            self._bound((seconds - before) / (moved + 1), (seconds - before) / (moved - 1))
        elif last is not None:
            # One exit before last[1], the next after `before`; had two come evenly, half of that is the least.
            self._bound(max(before - last[1], (seconds - last[1]) / 2), seconds - last[0])

    def _bound(self, shortest: float, longest: float) -> None:
        estimate = self.interval_seconds
        if estimate is None or estimate > longest:
            self.interval_seconds = longest
        elif estimate < shortest:
            self.interval_seconds = shortest


def explain_slowness(interval_seconds: float, exits: int, suspect: bool) -> str:
    """Return what to add to the evidence where exits come too slowly for trace sessions, "" where they do not.

    ``exits`` are those that a stall takes, ``suspect`` says that some were seen at one RIP.
    """
    if 2 * interval_seconds > SESSION_SECONDS:
        return f", too slowly to be judged: one in some {interval_seconds:.1f} s"
    if suspect and exits * interval_seconds > SESSION_SECONDS:
        return f", slowly: it takes several trace sessions to see {exits} of them"
    return ""
