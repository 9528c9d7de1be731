"""How often one vCPU takes notify exits of late, from a few numbers of its counter; pure.

Where they come fast, the last seconds tell it. Where they come one by one, a fixed time holds one or none, and a rate
over it jumps between 0 and too much. So there the rate is the mean of the last ``INTERVALS`` intervals from one exit to
the next, and the silence since the last exit lowers it: no more than one exit came in that time, and after
``STILL_INTERVALS`` intervals without one it is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Final

# A minute is a usual time between scrapes.
GAP_SECONDS: Final = 75.0
# A rate is over the last so many exits; where that is less than RATE_SECONDS, over that time.
INTERVALS: Final = 5
RATE_SECONDS: Final = 5.0
# As for verdicts (exporter/stalls/counter_track.py): a counter that stands still for so many intervals has stopped.
STILL_INTERVALS: Final = 3


def find_fast_rate(
    wanted: float, ended: float, before: tuple[float, int | None], after: tuple[float, int | None], number: int
) -> float | None:
    """Return the rate up to ``number`` at ``ended``, from the time ``wanted`` on or from the nearest that is known.

    None where the counter has not moved by INTERVALS since then: the last seconds do not tell.
    """
    (began, first), (then, second) = before, after
    if first is None or number - first < INTERVALS:
        return None
    if first == second:  # it has not moved before: so much was it at any time between the two
        began = max(began, wanted)
    elif then - began > GAP_SECONDS and second is not None:
        began, first = then, second
    fits = 0 < ended - began <= GAP_SECONDS and number - first >= INTERVALS
    return (number - first) / (ended - began) if fits else None


def find_sparse_rate(numbers: Iterable[tuple[float, int]]) -> float | None:
    """Return the rate by the counter's last numbers, newest first, each with its time; None where they do not tell it.

    What lies before a reset, or before a gap in which it moved, is left out.
    """
    newest = oldest = None
    moves: list[tuple[float, int]] = []
    exits = 0  # after the oldest of the moves
    for (ended, number), (began, before) in pairwise(numbers):
        if before > number or (before < number and ended - began > GAP_SECONDS):
            break
        newest, oldest = newest if newest is not None else ended, began
        if before < number:
            exits += moves[-1][1] if moves else 0
            # It moved at some time between the two.
            moves.append(((began + ended) / 2, number - before))
            if exits >= INTERVALS:
                break
    if newest is None or oldest is None or not moves:
        return None if newest is None else 0.0
    last = moves[0][0]
    # Where nothing came before, all that is known is since when there was nothing.
    interval = (last - moves[-1][0]) / exits if exits else (newest - oldest) / moves[0][1]
    silence = newest - last
    if silence > STILL_INTERVALS * interval:
        return 0.0
    return 1 / max(interval, silence)
