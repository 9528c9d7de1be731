"""The headline speaks of one and of many as people do, and of the same vCPU first as the table below it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from exporter.history.rates import RateHistory
from exporter.stalls.verdicts import MonitorReport, State, VcpuReport
from exporter.status_page.headline import Level, make_headline
from exporter.status_page.page import Frame, render_page
from exporter.status_page.text import describe_drills, describe_usage
from exporter.status_page.view import StatusView, make_status_view
from kvm.model import SourceReport
from tests.reports import USAGE, make_report
from tests.snapshots import make_snapshot
from tests.status_hosts import make_reports, make_vm_reading

NOW, UNIX = 100.0, 1.7e9
READINGS = [make_vm_reading(f"vm-{pid}", pid) for pid in range(1, 13)]


def draw(*vcpus: VcpuReport, sources: tuple[SourceReport, ...] = (SourceReport("bpf", up=True),)) -> StatusView:
    snapshot = make_snapshot(*READINGS, sources=sources)
    history = RateHistory()
    for seconds in (90.0, 100.0):
        moved = [make_vm_reading(f"vm-{pid}", pid, (int(seconds) * pid * pid, 0)) for pid in range(1, 13)]
        history.observe(replace(make_snapshot(*moved), monotonic_seconds=seconds))
    return make_status_view(snapshot, MonitorReport(vcpus=vcpus, trigger="bpf"), history, NOW, UNIX)


@pytest.mark.parametrize(
    ("state", "one", "many"),
    [
        (State.STALLED, "It takes notify exits", "Each takes notify exits"),
        (State.CONTEXT_LOST, "A notify exit came", "Notify exits came"),
        (State.SUSPECT, "It took two notify exits", "Each took two notify exits"),
        (State.UNKNOWN, "Its counter stands still", "Their counters stand still"),
        (State.NOTIFYING, "1 vCPU has yet to be judged", "12 vCPUs have yet to be judged"),
    ],
)
def test_one_is_it_and_many_are_they(state: State, one: str, many: str) -> None:
    rest = make_reports(READINGS[1:], State.QUIET, now=NOW)
    assert make_headline(draw(*make_reports(READINGS[:1], state, now=NOW), *rest), True).meaning.startswith(one)
    of_many = make_headline(draw(*make_reports(READINGS, state, now=NOW)), True)
    assert of_many.meaning.startswith(many)
    assert not re.search(r"\b(It|its|the VM|the owner)\b", of_many.meaning.replace("or its microcode", ""))


def test_drills_and_usage_have_their_number_too() -> None:
    drills = [replace(make_report(State.STALLED, vm=reading.vm), drill=True) for reading in READINGS[:2]]
    assert describe_drills(draw(drills[0]), True).endswith(" is said to be stuck and is well.")
    assert describe_drills(draw(*drills), True).endswith(" are said to be stuck and are well.")
    assert "; 1 time it was made to wait" in describe_usage(replace(USAGE, involuntary_switches=1))
    assert "; 2 times it was made to wait" in describe_usage(replace(USAGE, involuntary_switches=2))


@pytest.mark.parametrize("state", [State.STALLED, State.CONTEXT_LOST, State.SUSPECT, State.UNKNOWN])
def test_headline_and_table_name_the_same_vcpus_first(state: State) -> None:
    """In whatever order they take exits fastest, are numbered, or got stuck."""
    reports = [
        replace(report, verdict=replace(report.verdict, stuck_since_seconds=50.0 + number * 7 % 5))
        for number, report in enumerate(make_reports(READINGS, state, now=NOW))
    ]
    view = draw(*reports)
    named = re.findall("\u2068(.*?)\u2069", make_headline(view, True).text)
    assert len(named) == 3
    assert named == [row.vm.owner.name for row in view.find("", True).rows[:3]]
    longest = min(reports, key=lambda report: report.verdict.stuck_since_seconds or 0)
    assert named[0] == longest.vm.owner.name


@pytest.mark.parametrize(
    ("sources", "level"),
    [
        ((SourceReport("bpf", up=True), SourceReport("debugfs", False, "lockdown")), Level.NEUTRAL),
        ((SourceReport("bpf", False, "no BTF", "give CAP_BPF"), SourceReport("debugfs", True)), Level.WARN),
        ((SourceReport("bpf", False, "no BTF", "give CAP_BPF"),), Level.BAD),
        ((SourceReport("debugfs", False, "lockdown"),), Level.NEUTRAL),
    ],
)
def test_a_source_that_does_not_work_is_alarming_where_something_is_to_be_done(
    sources: tuple[SourceReport, ...], level: Level
) -> None:
    view = draw(sources=sources)
    page = render_page(Frame("", "", "", {}), view, view.find("", True), True)
    assert re.findall(r'<span class="is-(\w+)">does not work', page) == [level]
    assert ("nothing to do" in page) == (level is Level.NEUTRAL)


def test_the_sources_are_one_click_away() -> None:
    view = draw(sources=(SourceReport("bpf", up=True), SourceReport("debugfs", False, "lockdown")))
    page = render_page(Frame("", "", "", {}), view, view.find("", True), True)
    assert page.index('<a href="#sources">1 of 2</a>') < page.index('<table role="table" class="vcpus">')
    assert page.count('id="sources"') == 1
