"""What ``once`` prints."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from exporter.commands.columns import render_columns
from exporter.commands.once import render_json, render_table
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, VmCounters
from tests.snapshots import HIDDEN, make_reading, make_snapshot, make_unread


def test_the_table_has_a_row_a_vcpu_and_a_row_a_vm_that_could_not_be_read() -> None:
    table = render_table(make_snapshot(make_reading(), make_unread()))
    assert table == (
        "VM                NAME  OWNER  VMM           PID   VCPU  STATE     TID  NOTIFY EXITS  EXITS  PROTECTION  "
        "SOURCE\n"
        "uuid-4242         web   p1     qemu         4242      0  unknown  5000             3   1003  unknown     "
        "stats_fd\n"
        "uuid-4242         web   p1     qemu         4242      1  quiet    5001             0   1000  unknown     "
        "stats_fd\n"
        "firecracker-4343  -     -      firecracker  4343  all 2  -           -             -      -  unknown     "
        "its VMM holds no stats fds\n"
    )


def test_an_empty_host_says_so() -> None:
    assert render_table(make_snapshot()) == "no VM found\n"
    assert "but there may be some: /proc hides process 1" in render_table(make_snapshot(blind_spots=HIDDEN))


def test_no_name_can_drive_a_terminal() -> None:
    table = render_table(make_snapshot(make_reading("\x1b[2Jevil\nrow\u202eo" + "\u0335" * 50)))
    assert "\x1b" not in table
    assert "\u0335" * 5 not in table, "it would cover the lines around it"
    assert "\u202e" not in table
    assert len(table.splitlines()) == 3


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=5))
def test_columns_keep_one_line_a_row(rows: list[list[str]]) -> None:
    assert render_columns(("VM", "PID"), rows).count("\n") == len(rows) + 1


def test_json_sums_what_was_read_of_every_vcpu_and_of_no_fewer() -> None:
    whole = make_reading(notify=(3, 1))
    summed = replace(whole, vcpus=(), counters=VmCounters(totals={EXITS: 9}))
    snapshot = make_snapshot(whole, replace(whole, vcpu_count=3), summed)
    totals = [vm["totals"] for vm in json.loads(render_json(snapshot))["vms"]]
    assert totals == [{NOTIFY_WINDOW_EXITS: 4, EXITS: 2004}, {}, {EXITS: 9}]


def test_json_says_null_for_what_is_not_known() -> None:
    document = json.loads(render_json(make_snapshot(make_reading(), make_unread())))
    read, unread = document["vms"]
    counters = {"exits": 1003, "notify_window_exits": 3}
    assert read["vcpus"][0] == {"vcpu": 0, "vcpu_id": 0, "tid": 5000, "state": "unknown", **counters}
    assert (read["source"], read["problem"], read["name"], read["project"]) == ("stats_fd", None, "web", "p1")
    assert (unread["source"], unread["problem"], unread["vcpus"]) == (None, "its VMM holds no stats fds", [])
    assert unread["start_time_seconds"] is None
    assert document["sources"][1]["remedy"] == ""
