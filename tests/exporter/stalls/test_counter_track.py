"""One counter over time: by how much it moved, whether it began again, for how long it stood still."""

from __future__ import annotations

import pytest

from exporter.stalls.counter_track import STILL_INTERVALS, STILL_SECONDS, CounterTrack


def test_movement_is_that_since_the_reading_before_and_of_the_first_there_is_none() -> None:
    track = CounterTrack(0.0)
    assert track.observe(1.0, 5) is None
    assert (track.observe(2.0, 5), track.was_reset) == (0, False)
    assert (track.observe(3.0, 7), track.was_reset) == (2, False)
    assert (track.observe(4.0, 3), track.was_reset) == (3, True)
    assert (track.observe(5.0, 4), track.was_reset) == (1, False)
    assert track.value == 4


def test_a_reading_that_began_before_the_newest_ended_is_late() -> None:
    track = CounterTrack(0.0)
    assert not track.is_late(-1.0)  # there is none yet
    track.observe(2.0, 5)
    assert (track.is_late(1.9), track.is_late(2.0)) == (True, False)


def test_a_slow_counter_may_stand_still_for_longer() -> None:
    track = CounterTrack(0.0)
    assert track.still_limit_seconds == STILL_SECONDS
    for seconds in (2.0, 4.0):
        track.interval.observe_pair(seconds)
        track.interval.begin_session()
    assert track.still_limit_seconds == STILL_INTERVALS * 4.0


def test_still_and_unread_are_counted_from_what_was_last_known() -> None:
    track = CounterTrack(10.0)
    assert (track.find_still(15.0), track.find_unread(15.0, float("-inf"))) == (5.0, 5.0)
    track.observe(12.0, 1)
    assert track.find_unread(15.0, float("-inf")) == 3.0
    assert track.find_unread(15.0, 14.0) == pytest.approx(1.0)
    track.moved_seconds = 14.5
    assert (track.find_still(15.0), track.find_unread(15.0, 14.0)) == (0.5, 0.5)
