"""How long it takes from one notify exit to the next, told from records and from readings at all sorts of moments."""

from __future__ import annotations

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.stalls.interval import IntervalEstimator


def read(exits: list[float], readings: list[float]) -> float | None:
    """Read a counter that counts exits at certain moments; returns the estimate."""
    cadence, before = IntervalEstimator(), 0
    for seconds in readings:
        count = bisect.bisect_right(exits, seconds)
        cadence.observe_reading(seconds, count - before)
        before = count
    return cadence.interval_seconds


def test_one_exit_tells_nothing() -> None:
    assert read([0.5], [0.0, 1.0, 2.0]) is None


def test_a_reading_just_after_another_does_not_make_a_slow_vcpu_look_fast() -> None:
    exits = [1.3 * number for number in range(1, 20)]
    for late in (0.001, 0.05, 0.3, 0.7):
        readings = sorted([float(second) for second in range(20)] + [seconds + late for seconds in exits[:14]])
        assert 1.3 <= (read(exits, readings) or 0.0) <= 2.3


@given(st.floats(0.02, 8.0), st.floats(0.0, 1.0), st.lists(st.floats(0.0, 40.0), max_size=20))
def test_steady_exits_are_never_taken_for_faster_than_they_are(
    interval: float, phase: float, extra: list[float]
) -> None:
    exits = [phase + interval * number for number in range(1, 2 + int(40 / interval))]
    estimate = read(exits, sorted({*map(float, range(40)), *extra}))
    assert estimate is not None
    assert interval * 0.999 <= estimate <= interval + 2.0 + 1e-6


def test_it_is_soon_known_that_exits_come_faster_and_that_they_come_slower() -> None:
    exits = [7.0, 14.0, 21.0, *(22.0 + 0.01 * number for number in range(500)), *(30.0 + 0.9 * n for n in range(9))]
    assert read(exits, [float(second) for second in range(22)]) == pytest.approx(7.0, abs=1.0)
    assert read(exits, [float(second) for second in range(24)]) == pytest.approx(0.01, abs=0.001)
    assert 0.4 < (read(exits, [float(second) for second in range(38)]) or 0.0) <= 2.0


def test_records_tell_it_exactly_and_readings_do_not_spoil_it() -> None:
    cadence = IntervalEstimator()
    cadence.observe_reading(0.0, 0)
    cadence.observe_reading(1.0, 1)
    cadence.begin_session()
    cadence.observe_pair(1.7)
    for second in (3.0, 5.0):
        cadence.observe_reading(second, 1)
    assert cadence.interval_seconds == 1.7
    cadence.observe_pair(1.6)
    cadence.observe_pair(1.9)
    assert cadence.interval_seconds == 1.6
    cadence.begin_session()
    cadence.observe_pair(1.8)
    assert cadence.interval_seconds == 1.8
