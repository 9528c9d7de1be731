"""Steps of a plot: exits beside a rest take a usual time, and stay as many."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.history.steps import Step, widen_steps


def test_one_exit_is_spread_over_the_rest_after_it() -> None:
    assert widen_steps([Step(0, 19, 0.0), Step(19, 20, 1.0), Step(20, 39, 0.0)]) == [
        Step(0, 19, 0.0),
        Step(19, 24, 0.2),
        Step(24, 39, 0.0),
    ]


def test_the_newest_one_takes_from_the_rest_before_it() -> None:
    assert widen_steps([Step(0, 19, 0.0), Step(19, 20, 1.0)]) == [Step(0, 15, 0.0), Step(15, 20, 0.2)]
    assert widen_steps([Step(0, 19, 0.0), Step(19, 20, 1.0), Step(20, 22, 0.0)]) == [
        Step(0, 17, 0.0),
        Step(17, 22, 0.2),
    ]


def test_what_has_no_rest_beside_it_stays() -> None:
    steps = [Step(0, 3, 4.0), Step(3, 5, 2.0), Step(9, 10, 1.0), Step(20, 60, 0.1)]
    assert widen_steps(steps) == steps
    assert widen_steps([]) == []


@given(st.lists(st.tuples(st.floats(0.5, 30), st.sampled_from([0.0, 0.0, 0.5, 3.0]), st.booleans()), max_size=30))
def test_exits_stay_as_many_and_steps_in_order(parts: list[tuple[float, float, bool]]) -> None:
    steps, seconds = [], 0.0
    for length, rate, has_gap in parts:
        seconds += 7.0 * has_gap
        steps.append(Step(seconds, seconds + length, rate))
        seconds += length
    widened = widen_steps(steps)
    assert sum(step.exits for step in widened) == pytest.approx(sum(step.exits for step in steps))
    assert sum(step.seconds for step in widened) == pytest.approx(sum(step.seconds for step in steps))
    assert all(before.ended <= after.began for before, after in pairwise(widened))
    peak = max((step.rate for step in steps), default=0.0)
    assert all(step.rate <= peak * (1 + 1e-9) for step in widened)
