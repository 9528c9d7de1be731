"""The thread that reads: a reading that hangs holds up nobody, and one that fails is met."""

from __future__ import annotations

import threading

import pytest

from exporter.top.comparison import NOTIFY_KEY, Subject
from exporter.top.feed import SnapshotFeed, read_twice
from kvm.model import Snapshot
from tests.exporter.top.scene import later, make_vm
from tests.snapshots import make_snapshot
from tests.waiting import wait_until


class Reader:
    """Takes snapshots in which three notify exits a second are counted; hangs or fails from the given one on."""

    def __init__(self, *, hangs_at: int = -1, fails_at: int = -1) -> None:
        self.taken = 0
        self.released = threading.Event()
        self._hangs_at, self._fails_at = hangs_at, fails_at

    def read(self) -> Snapshot:
        number, self.taken = self.taken, self.taken + 1
        if number == self._hangs_at:
            self.released.wait()
        if number == self._fails_at:
            raise RuntimeError("broken")
        return later(make_snapshot(make_vm(notify=(3 * number, 0))), number)

    def close(self) -> None:
        pass


def test_two_snapshots_make_a_rate() -> None:
    slept: list[float] = []
    both = read_twice(Reader(), 7.0, slept.append)
    (reading,) = both.now.readings
    assert both.find_rate(Subject(reading), NOTIFY_KEY) == 3.0
    assert slept == [7.0]


def test_it_compares_each_snapshot_with_the_one_before() -> None:
    reader, news = Reader(), threading.Semaphore(0)
    feed = SnapshotFeed(reader, 0.001, news.release)
    assert feed.find_newest() is None
    feed.start()
    for _ in range(3):
        assert news.acquire(timeout=30)
    assert feed.stop()
    newest = feed.find_newest()
    assert newest is not None
    assert newest.find_rate(Subject(newest.now.readings[0]), NOTIFY_KEY) == 3.0
    assert newest.now.monotonic_seconds == 100 + reader.taken - 1
    assert feed.measure_reading() == 0


def test_a_reading_that_hangs_is_told_and_waited_for_a_moment_only() -> None:
    reader = Reader(hangs_at=1)
    feed = SnapshotFeed(reader, 0.001)
    feed.start()
    wait_until(lambda: reader.taken == 2 and feed.measure_reading() > 0.01, "it hangs")
    newest = feed.find_newest()
    assert newest is not None
    assert newest.now.monotonic_seconds == 100
    assert not feed.stop()
    reader.released.set()
    assert feed.stop()


def test_what_the_reader_raises_is_raised_to_who_asks() -> None:
    news = threading.Semaphore(0)
    feed = SnapshotFeed(Reader(fails_at=0), 0.001, news.release)
    feed.start()
    assert news.acquire(timeout=30)
    with pytest.raises(RuntimeError, match="broken"):
        feed.find_newest()
    assert feed.stop()
