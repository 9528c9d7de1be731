"""What stands above the table."""

from __future__ import annotations

from dataclasses import replace

from exporter.top.comparison import Comparison
from exporter.top.notes import Status, find_notes
from kvm.model import SourceReport
from tests.exporter.top.scene import make_vm
from tests.snapshots import CLOSED, HIDDEN, make_snapshot, make_unread


def test_there_is_nothing_to_say_of_a_host_that_is_seen_whole() -> None:
    assert find_notes(Comparison(make_snapshot(make_vm())), Status()) == []


def test_it_says_what_is_missing_the_worst_first() -> None:
    snapshot = make_snapshot(make_vm(), make_unread(), blind_spots=HIDDEN)
    limited = SourceReport("stats_fd", up=True, reason="without the statistics")
    other = SourceReport("debugfs", up=True, reason="of which nothing is shown")
    comparison = Comparison(replace(snapshot, sources=(limited, other)))
    assert find_notes(comparison, Status(reading_seconds=12.3, logged="msg=strange")) == [
        "no news: reading the host has taken 12 s so far",
        "VMs may be missing: /proc hides process 1",
        "VMs that cannot be read: 1: its VMM holds no stats fds",
        "without the statistics",
        "msg=strange",
    ]


def test_it_says_that_no_source_works() -> None:
    comparison = Comparison(make_snapshot(sources=(CLOSED,)))
    assert find_notes(comparison, Status()) == ["no source works: debugfs: the kernel's lockdown forbids it"]


def test_nothing_in_it_drives_a_terminal() -> None:
    comparison = Comparison(make_snapshot(make_unread("\x1b[2J\nx")))
    notes = find_notes(comparison, Status(logged="\x1b]0;title\x07"))
    assert all(note.isprintable() for note in notes)


def test_it_says_before_the_first_snapshot_that_it_takes_long() -> None:
    assert find_notes(None, Status(reading_seconds=2)) == []
    assert len(find_notes(None, Status(reading_seconds=4))) == 1
