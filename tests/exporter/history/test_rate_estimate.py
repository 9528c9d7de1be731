"""Rates from a few numbers: of what comes fast, and of what comes one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.history.rate_estimate import GAP_SECONDS, INTERVALS, STILL_INTERVALS, find_fast_rate, find_sparse_rate


def read_each_second(times: list[float], until: int) -> list[tuple[float, int]]:
    """The numbers of a counter that moved at these times, newest first."""
    return [(float(second), sum(time <= second for time in times)) for second in range(until, -1, -1)]


@pytest.mark.parametrize("interval", [2.0, 7.0, 20.0, 50.0])
def test_what_comes_evenly_has_one_rate_at_all_times(interval: float) -> None:
    times = [interval * number for number in range(1, 30)]
    for until in range(int(3 * interval), int(6 * interval)):
        rate = find_sparse_rate(read_each_second(times, until))
        assert rate == pytest.approx(1 / interval, rel=1.1 / interval)


def test_silence_lowers_a_rate_and_ends_it() -> None:
    times = [20.0, 40.0, 60.0]
    assert find_sparse_rate(read_each_second(times, 79)) == pytest.approx(1 / 20)
    assert find_sparse_rate(read_each_second(times, 100)) == pytest.approx(1 / 40, rel=0.02)
    assert find_sparse_rate(read_each_second(times, 60 + STILL_INTERVALS * 20 + 1)) == 0.0


def test_a_single_exit_is_one_in_the_time_that_is_known() -> None:
    assert find_sparse_rate(read_each_second([100.5], 200)) == pytest.approx(1 / 200)
    assert find_sparse_rate(read_each_second([], 200)) == 0.0
    assert find_sparse_rate([(3.0, 7)]) is None
    assert find_sparse_rate([]) is None


def test_the_last_intervals_count_and_no_older_ones() -> None:
    times = [1.0, 2.0, 3.0, 4.0, *(10.0 + 20 * number for number in range(INTERVALS + 1))]
    assert find_sparse_rate(read_each_second(times, 10 + 20 * INTERVALS)) == pytest.approx(1 / 20)


def test_resets_and_gaps_are_not_counted_across() -> None:
    assert find_sparse_rate([(2.0, 3), (1.0, 9)]) is None
    assert find_sparse_rate([(3.0, 3), (2.0, 3), (1.0, 9)]) == 0.0
    assert find_sparse_rate([(GAP_SECONDS + 2, 9), (1.0, 3)]) is None
    assert find_sparse_rate([(1000.0, 9), (1.0, 9)]) == 0.0


def test_a_fast_rate_takes_exits_enough() -> None:
    assert find_fast_rate(5.0, 10.0, (5.0, 0), (6.0, 40), 200) == pytest.approx(40)
    assert find_fast_rate(5.0, 10.0, (5.0, 0), (6.0, 1), INTERVALS - 1) is None
    assert find_fast_rate(5.0, 10.0, (5.0, None), (6.0, 1), 9) is None
    assert find_fast_rate(5.0, 10.0, (5.0, 9), (6.0, 1), 2) is None


@given(st.lists(st.tuples(st.floats(min_value=0.1, max_value=60), st.integers(0, 3)), min_size=1, max_size=40))
def test_a_rate_is_never_above_what_the_numbers_allow(moves: list[tuple[float, int]]) -> None:
    numbers = [(0.0, 0)]
    for pause, by in moves:
        numbers.append((numbers[-1][0] + pause, numbers[-1][1] + by))
    rate = find_sparse_rate(reversed(numbers))
    assert rate is not None
    assert rate >= 0
    # Half the shortest pause between two readings is the least that may lie between two moves.
    shortest = min(pause for pause, _by in moves)
    assert rate <= max(by for _pause, by in moves) / (shortest / 2)
