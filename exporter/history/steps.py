"""What a counter did in some minutes, as a plot shows it: times with their average rates; pure."""

from __future__ import annotations

from typing import Final, NamedTuple

SPACING_SECONDS: Final = 5.0


class Step(NamedTuple):
    """A time with its average rate, in exits a second."""

    began: float
    ended: float
    rate: float

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.ended - self.began

    @property
    def exits(self) -> float:
        """How many exits came in it."""
        return self.rate * self.seconds


def widen_steps(steps: list[Step]) -> list[Step]:
    """Spread exits that came beside a rest over SPACING_SECONDS: one exit is no rate of one a second.

    The time is taken from the rest after it and, while that is too short, from the one before it.
    """
    widened: list[Step] = []
    for position, step in enumerate(steps):
        after = steps[position + 1] if position + 1 < len(steps) else None
        began, ended = step.began, step.ended
        if widened:  # which may have taken some of a rest
            began = min(max(began, widened[-1].ended), ended)
        if step.rate and ended - began < SPACING_SECONDS:
            if after is not None and not after.rate and after.began == ended:
                ended = min(after.ended, began + SPACING_SECONDS)
            if widened and not widened[-1].rate and widened[-1].ended == began:
                began = max(widened[-1].began, min(began, ended - SPACING_SECONDS))
                widened[-1] = widened[-1]._replace(ended=began)
        if ended > began:
            widened.append(Step(began, ended, step.exits / (ended - began)))
    return [step for step in widened if step.seconds > 0]
