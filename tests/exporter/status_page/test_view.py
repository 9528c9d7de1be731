"""Which vCPUs the status page shows, in which order, and what a search finds for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.history.rates import RateHistory
from exporter.stalls.verdicts import MonitorReport, State, VcpuReport
from exporter.status_page.view import SHOWN_QUIET_ROWS, SHOWN_ROWS, Found, StatusView, make_status_view
from kvm.model import NOTIFY_WINDOW_EXITS, Protection, Snapshot, VmCounters
from tests.reports import make_report
from tests.snapshots import make_snapshot, make_unread
from tests.status_hosts import make_large_host, make_reports, make_vm_reading

NOW, UNIX = 100.0, 1.7e9


def draw(
    snapshot: Snapshot | None, *vcpus: VcpuReport, history: RateHistory | None = None, trigger: str = "bpf"
) -> StatusView:
    return make_status_view(snapshot, MonitorReport(vcpus=vcpus, trigger=trigger), history or RateHistory(), NOW, UNIX)


def list_ids(found: Found) -> list[str]:
    return [row.vm.id for row in found.rows]


def test_the_worst_comes_first() -> None:
    readings = [make_vm_reading(f"vm-{pid}", pid) for pid in range(1, 8)]
    states = [State.QUIET, State.PROGRESSING, State.UNKNOWN, State.SUSPECT, State.STALLED, State.NOTIFYING]
    reports = make_reports(readings[:6], *states)
    history = RateHistory()
    for seconds, exits in ((90.0, 0), (100.0, 400)):
        moved = make_vm_reading("vm-6", 6, (exits, 0))
        history.observe(replace(make_snapshot(moved), monotonic_seconds=seconds))
    picture = draw(make_snapshot(*readings), *reports, history=history)
    found = picture.find("", True)
    assert [row.state for row in found.rows] == [
        State.STALLED,
        State.SUSPECT,
        State.UNKNOWN,
        State.NOTIFYING,  # for its rate
        State.PROGRESSING,  # for its count
        State.QUIET,
        State.QUIET,  # it has counted before the monitor was there
    ]
    assert found.rows[3].rate == pytest.approx(40)
    assert found.rows[3].steps
    assert found.rows[-1].report is None


def test_of_the_stuck_the_one_that_is_so_for_longest_comes_first_whatever_its_rate() -> None:
    readings = [make_vm_reading(f"vm-{pid}", pid) for pid in range(1, 4)]
    history = RateHistory()
    for seconds, exits in ((90.0, 0), (100.0, 4000)):
        moved = make_vm_reading("vm-1", 1, (exits, 0))
        history.observe(replace(make_snapshot(moved), monotonic_seconds=seconds))
    reports = [
        replace(report, verdict=replace(report.verdict, stuck_since_seconds=since))
        for report, since in zip(make_reports(readings, State.STALLED), (50.0, 20.0, 50.0), strict=True)
    ]
    assert list_ids(draw(make_snapshot(*readings), *reports, history=history).find("", True)) == [
        "uuid-2",
        "uuid-1",
        "uuid-3",
    ]


def test_a_drill_is_marked_and_comes_after_what_is_real() -> None:
    reading = make_vm_reading("web", 1)
    drill = replace(make_report(State.STALLED, vm=reading.vm), drill=True)
    (real,) = make_reports([make_vm_reading("other", 2)], State.STALLED)
    picture = draw(make_snapshot(reading), drill, real)
    assert [(row.vm.owner.name, row.drill) for row in picture.find("", True).rows[:2]] == [
        ("other", False),
        ("web", True),
    ]
    assert len(picture.find_in(State.STALLED)) == 1
    # The vCPU of the drill has a row of its own, for what it really did.
    assert len([row for row in picture.rows if row.vm == reading.vm]) == 2
    assert len(picture.find_real()) == 2


def test_what_is_not_watched_is_not_called_quiet() -> None:
    assert draw(make_snapshot(make_vm_reading("web", 1)), trigger="").rows[0].state is None
    unwatched = make_status_view(make_snapshot(make_vm_reading("web", 1)), None, RateHistory(), NOW, UNIX)
    assert unwatched.rows[0].state is None


def test_a_vm_of_which_only_the_sum_is_known() -> None:
    counters = VmCounters(totals={NOTIFY_WINDOW_EXITS: 12})
    reading = replace(make_vm_reading("web", 1), vcpus=(), counters=counters)
    (row,) = draw(make_snapshot(reading)).rows
    assert (row.vcpu, row.notify_exits, row.state) == (None, 12, None)


def test_before_the_first_look() -> None:
    picture = draw(None)
    assert picture.find("web", True).rows == []
    assert picture.count_vcpus() is None


def test_search_takes_every_word_in_any_case() -> None:
    readings = [make_vm_reading("Web-1", 1), make_vm_reading("web-2", 2), make_vm_reading("db-1", 3)]
    picture = draw(make_snapshot(*readings), *make_reports(readings, State.STALLED, State.QUIET))
    assert list_ids(picture.find("WEB", True)) == ["uuid-1", "uuid-2"]
    assert list_ids(picture.find("web stalled", True)) == ["uuid-1"]
    assert list_ids(picture.find("uuid-3", True)) == ["uuid-3"]
    assert list_ids(picture.find("owner-of-db", True)) == ["uuid-3"]
    assert list_ids(picture.find("0xffffffff81012345", True)) == ["uuid-1", "uuid-3", "uuid-2"]
    assert picture.find("nothing of the kind", True).matching == 0


@pytest.mark.parametrize("query", ["web", "owner-of-web", "bew", "0xffffffff81012345", "qemu", "owner", "4711"])
def test_a_stranger_finds_nothing_by_what_strangers_do_not_see(query: str) -> None:
    busy, quiet = make_vm_reading("web", 4711), make_vm_reading("web-quiet", 47112, (0, 0))
    picture = draw(make_snapshot(busy, quiet), *make_reports([busy], State.STALLED))
    if query != "4711":  # here a part of the id, which everybody sees
        found = picture.find(query, False)
        assert (found.matching, found.quiet_matching) == (0, 0)
    assert picture.find(query, True).matching == 1
    assert picture.find("uuid-4711 stalled", False).matching == 1


def test_search_finds_vms_without_notify_exits_as_well() -> None:
    readings = [make_vm_reading("web", 1), make_vm_reading("web-quiet", 2, (0, 0)), make_unread()]
    picture = draw(make_snapshot(*readings))
    assert picture.find("", True).quiet == []
    (quiet,) = picture.find("web-quiet", True).quiet
    assert (quiet.notify_exits, quiet.state) == (0, State.QUIET)
    (unread,) = picture.find("firecracker", True).quiet
    assert (unread.notify_exits, unread.state) == (None, None)


def test_the_first_rows_of_many() -> None:
    picture = draw(make_large_host(100, 16, 3))
    found = picture.find("", True)
    assert (len(found.rows), found.matching, found.all_rows) == (SHOWN_ROWS, 1600, 1600)
    quiet = draw(make_snapshot(*(make_vm_reading(f"web-{pid}", pid, (0,)) for pid in range(1, 31))))
    searched = quiet.find("web", True)
    assert (len(searched.quiet), searched.quiet_matching) == (SHOWN_QUIET_ROWS, 30)
    counts = [row.notify_exits for row in found.rows]
    assert counts == sorted(counts, key=lambda count: -(count or 0))


def test_protections_are_counted() -> None:
    off = replace(make_vm_reading("b", 2), protection=Protection.OFF)
    picture = draw(make_snapshot(make_vm_reading("a", 1), off, make_vm_reading("c", 3)))
    assert picture.count_protections() == {Protection.ARMED: 2, Protection.OFF: 1}
    assert picture.count_vcpus() == 6
