"""The screen, as it is drawn."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.top.cells import measure_width
from exporter.top.comparison import Comparison
from exporter.top.notes import Status
from exporter.top.screen import Style, render_screen
from exporter.top.view import Opened, Place, Question, View
from tests.exporter.top.scene import compare, make_summed, make_vm
from tests.snapshots import HIDDEN, make_snapshot, make_unread

BEFORE = [make_vm("web", 1), make_vm("db", 2, notify=(5, 0)), make_summed("old", 3), make_unread()]
NOW = [make_vm("web", 1, halts=(30, 20)), make_vm("db", 2, notify=(5, 90)), make_summed("old", 3), make_unread()]
VCPU = Place(NOW[1].vm.key, 2)


def draw(view: View, comparison: Comparison | None = None, width: int = 80, height: int | None = 12) -> list[str]:
    screen = render_screen(view, comparison or compare(BEFORE, NOW), Status("kvm07"), width, height)
    return [re.sub(r"\d\d:\d\d:\d\d", "hh:mm:ss", line.text).rstrip() for line in screen.lines]


def test_eighty_columns() -> None:
    assert draw(View()) == [
        "4 VMs, 8 vCPUs by debugfs, stats_fd  kvm07                              hh:mm:ss",
        "VMs by vcpu/notify_window_exits per second",
        "VMs that cannot be read: 1: its VMM holds no stats fds",
        "  VM                            VCPUS *notify_window_exits     exits  halt_exits",
        "> db                                2                   45        45           0",
        "  web                               2                    0         0          10",
        "  old                               2                    0         0           0",
        "  firecracker-4343              not read: its VMM holds no stats fds",
        *("", "", ""),
        "q leave  ? help  / search  s sort  n notify exits  enter open  v vCPUs  f freeze",
    ]


def test_forty_columns_and_ten_lines() -> None:
    assert draw(View(sort="vcpu/halt_exits", is_frozen=True), width=40, height=10) == [
        "4 VMs, 8 vCPUs by debug… FROZEN hh:mm:ss",
        "VMs by vcpu/halt_exits per second",
        "VMs that cannot be read: 1: its VMM hol…",
        "  VM                   VCPUS *halt_exits",
        "> web                      2          10",
        "  db                       2           0",
        "  old                      2           0",
        "  firecracker-4343     not read: its VM…",
        "",
        "q leave  ? help  / search  s sort  a all",
    ]


def test_a_vm_of_which_only_sums_are_known_is_no_vcpu() -> None:
    rows = [line.split() for line in draw(View(all_vcpus=True))]
    assert ["db", "0"] in [row[:2] for row in rows]
    assert ["old", "all"] in [row[:2] for row in rows], "not 2, which is another vCPU's number"


def test_vcpus_of_a_vm_and_their_statistics() -> None:
    of_vm = Opened(Place(VCPU.vm), False)
    assert [line.split() for line in draw(View(opened=(of_vm,)))[3:6]] == [
        ["VCPU", "THREAD", "*notify_window_exits", "exits", "halt_exits"],
        [">", "1", "5001", "45", "45", "0"],
        ["0", "5000", "0", "0", "0"],
    ]
    lines = draw(View(opened=(of_vm, Opened(VCPU, True))), height=20)
    assert lines[1] == "statistics of vCPU 1 of db"
    assert [line.split() for line in lines[3:6]] == [
        ["STATISTIC", "VALUE", "PER", "SECOND"],
        [">", "exits", "1,090", "45"],
        ["notify_window_exits", "90", "45"],
    ]
    assert lines[8].split() == ["guest_mode", "1", "-"]
    narrow = draw(View(opened=(of_vm, Opened(VCPU, True))), width=40, height=10)
    assert narrow[3:6] == [
        "  STATISTIC                   PER SECOND",
        "> exits                               45",
        "  notify_window_exits                 45",
    ]


def test_what_is_not_known_is_a_dash() -> None:
    first = Comparison(make_snapshot(*NOW))
    assert draw(View(), first)[4].split() == [">", "web", "2", "-", "-", "-"]
    assert draw(View(sort="vcpu/gone"), first)[4].split()[:4] == [">", "web", "2", "-"]


def test_the_sorting_statistic_always_has_a_column() -> None:
    for key in compare(BEFORE, NOW).statistics:
        for width in (20, 40, 80, 200):
            screen = render_screen(View(sort=key), compare(BEFORE, NOW), Status(), width, 24)
            assert key in screen.shown.columns


def test_it_says_what_it_is_without_rows() -> None:
    empty = Comparison(make_snapshot(blind_spots=HIDDEN))
    assert "no VM found" in draw(View(), empty)
    assert "VMs may be missing: /proc hides process 1" in draw(View(), empty)
    assert "nothing matches; esc shows all" in draw(View(search="x"), empty)
    gone = View(opened=(Opened(VCPU, True),))
    assert draw(gone, empty)[1] == "statistics of a VM that has ended"
    assert "it has ended; esc goes back" in draw(gone, empty)
    sums = View(opened=(Opened(Place(NOW[2].vm.key), False),))
    assert any(line.startswith("only sums over all vCPUs") for line in draw(sums))
    assert render_screen(View(), None, Status(), 80, 24).lines[0].text.startswith("reading the host")


def test_all_keys_are_told_in_forty_columns_and_ten_lines() -> None:
    lines = draw(View(has_help=True), width=40, height=10)
    assert [line.split()[0].strip(",") for line in lines[:9]] == ["q", "/", "n", "s", "enter", "a", "esc", "v", "f"]
    assert not any("…" in line for line in lines)


def test_help_has_the_whole_text_of_what_was_cut() -> None:
    long = HIDDEN[0]._replace(text="word " * 60 + "end")
    text = " ".join(draw(View(has_help=True), Comparison(make_snapshot(blind_spots=(long,))), width=40, height=40))
    assert "word end" in text


def test_questions_stand_at_the_bottom() -> None:
    assert draw(View(question=Question.SEARCH, typed="we", search="we"))[-1] == "search: we|"
    assert draw(View(question=Question.SORT, typed="halt"))[-1] == "sort by: halt|  vcpu/halt_exits"
    assert draw(View(question=Question.SORT, typed="x!"))[-1] == "sort by: x!|  no such statistic"


def test_the_selected_row_is_on_the_screen_and_told_by_more_than_its_style() -> None:
    vms = [make_vm(f"vm-{number}", number) for number in range(1, 100)]
    comparison = compare(vms, vms)
    view = View(selected=Place(vms[70].vm.key))
    screen = render_screen(view, comparison, Status(), 80, 24)
    (selected,) = [line for line in screen.lines if line.text.startswith("> ")]
    assert selected.text.split()[1] == "vm-71"
    assert selected.style is Style.REVERSE
    assert screen.shown.page == 20


def test_a_pipe_gets_every_row_and_no_keys() -> None:
    vms = [make_vm(f"vm-{number}", number) for number in range(1, 100)]
    lines = draw(View(), compare(vms, vms), height=None)
    assert len(lines) == 3 + len(vms)
    assert not any(line.startswith(">") for line in lines)


VIEWS = st.sampled_from(
    [
        *(View(), View(all_vcpus=True), View(has_help=True), View(sort="vm/pages_4k"), View(search="w")),
        *(View(opened=(Opened(Place(VCPU.vm), False),)), View(opened=(Opened(VCPU, True),))),
    ]
)


@given(VIEWS, st.text(max_size=80), st.integers(1, 200), st.integers(1, 40))
def test_every_line_is_as_wide_as_the_screen_whatever_a_vm_is_called(
    view: View, name: str, width: int, height: int
) -> None:
    unread = make_unread(name)
    both = [make_vm(name, 2), make_summed(name, 3), replace(unread, vm=replace(unread.vm, id=name))]
    screen = render_screen(replace(view, search=name[:3]), compare(both, both), Status(name, 9, name), width, height)
    assert len(screen.lines) == height
    assert {measure_width(line.text) for line in screen.lines} == {width}
    assert all(line.text.isprintable() for line in screen.lines)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_columns_are_below_their_titles(width: int) -> None:
    lines = draw(View(), width=width, height=24)
    head, row = lines[3], lines[4]
    for title in head.split()[2:]:
        end = head.index(title) + len(title)
        assert row[end - 1].isdigit() or row[end - 1] == "%"
        assert row[end : end + 1] in ("", " ")
