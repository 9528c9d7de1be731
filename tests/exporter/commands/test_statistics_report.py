"""What ``once --stats`` prints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from exporter.cli import parse_command_line
from exporter.commands.once import build_document, run_once
from exporter.commands.statistics_report import render_statistics, render_statistics_json
from kvm.model import SourceReport
from kvm.statistics import StatScope, StatTable, VmStatistics
from tests.exporter.top.scene import compare, make_summed, make_vm
from tests.snapshots import HIDDEN, make_reading, make_unread

BEFORE, NOW = make_vm(), make_vm(halts=(12, 20), blocked=(10**9, 0), flushes=6)


def test_the_table_has_a_row_a_statistic_of_a_vm_or_a_vcpu() -> None:
    table = render_statistics(compare([BEFORE, make_summed()], [NOW, make_summed(halts=40)]))
    assert table == (
        "VM         NAME  VCPU  STATISTIC            VALUE  PER SECOND  SOURCE\n"
        "uuid-4242  web      -  vm/remote_tlb_flush      6         0.5  stats_fd\n"
        "uuid-4242  web      -  vm/pages_4k             77           -  stats_fd\n"
        "uuid-4242  web      0  vcpu/halt_exits         12           1  stats_fd\n"
        "uuid-4242  web      1  vcpu/halt_exits         20           0  stats_fd\n"
        "uuid-4242  web      0  vcpu/blocking_ns       1 s         50%  stats_fd\n"
        "uuid-4242  web      1  vcpu/blocking_ns       0 s          0%  stats_fd\n"
        "uuid-4242  web      0  vcpu/guest_mode          0           -  stats_fd\n"
        "uuid-4242  web      1  vcpu/guest_mode          1           -  stats_fd\n"
        "uuid-4343  old      -  vm/remote_tlb_flush      5           0  debugfs\n"
        "uuid-4343  old    all  vcpu/halt_exits         40           5  debugfs\n"
        "uuid-4343  old    all  vcpu/blocking_ns       0 s          0%  debugfs\n"
    )


def test_a_vm_without_statistics_says_why() -> None:
    plain = make_reading(pid=1)
    both = compare([], [make_unread(), plain])
    assert [line.split("  ")[-1] for line in render_statistics(both).splitlines()[1:]] == [
        "its VMM holds no stats fds",
        "nothing was read that --collector.stats.include and .exclude leave; histograms: --format=json",
    ]
    both.now = replace(both.now, sources=(SourceReport("stats_fd", up=True, reason="without a table of them"),))
    assert render_statistics(both).splitlines()[-1].endswith("without a table of them")


def test_a_vm_of_which_no_statistic_is_wanted_is_there_and_says_why() -> None:
    reading = make_vm()
    of_none = reading.counters._replace(statistics=VmStatistics(StatTable(StatScope.VCPU)))
    both = compare([], [replace(reading, counters=of_none)])
    (row,) = render_statistics(both).splitlines()[1:]
    assert row.startswith("uuid-4242  web ")
    assert "--collector.stats.include" in row


def test_vms_that_may_be_missing_are_told() -> None:
    both = compare([], [])
    assert render_statistics(both) == "no VM found\n"
    both.now = replace(both.now, blind_spots=HIDDEN)
    assert "VMs may be missing: /proc hides process 1" in render_statistics(both)


def test_no_name_can_drive_a_terminal_or_widen_the_table() -> None:
    table = render_statistics(compare([], [make_vm("\x1b[2J\u202e" + "w" * 500)]))
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert max(map(len, table.splitlines())) < 160


def test_json_has_everything_with_histograms_in_units() -> None:
    both = compare([BEFORE, make_unread()], [NOW, make_unread()])
    document = json.loads(render_statistics_json(both, build_document(both.now)))
    assert document["rate_seconds"] == 2
    read, unread = document["vms"]
    assert unread["statistics"] is None
    found = {statistic["statistic"]: statistic for statistic in read["statistics"]}
    flush = {"statistic": "vm/remote_tlb_flush", "kind": "cumulative", "unit": None, "value": 6, "per_second": 0.5}
    assert found["vm/remote_tlb_flush"] == flush
    assert found["vm/pages_4k"]["per_second"] is None
    assert found["vcpu/blocking_ns"]["unit"] == "seconds"
    assert found["vcpu/blocking_ns"]["vcpus"] == [
        {"vcpu": 0, "value": 1, "per_second": 0.5},
        {"vcpu": 1, "value": 0, "per_second": 0.0},
    ]
    histogram = found["vcpu/halt_wait_hist"]
    assert histogram["upper_bounds"] == [1e-9, 2e-9]
    assert histogram["vcpus"][1] == {"vcpu": 1, "counts": [0, 0, 0]}


def test_json_of_sums() -> None:
    both = compare([make_summed()], [make_summed(halts=40)])
    ((vm,),) = [json.loads(render_statistics_json(both, build_document(both.now)))["vms"]]
    halts = {statistic["statistic"]: statistic for statistic in vm["statistics"]}["vcpu/halt_exits"]
    assert (halts["value"], halts["per_second"], "vcpus" in halts) == (40, 5.0, False)


@pytest.mark.parametrize("flag", ["--format=prometheus", "--output=/nowhere/a.prom", "--from-agent=unix:/nowhere/a"])
def test_what_makes_no_sense_together_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match="--stats"):
        run_once(parse_command_line(["once", "--stats", flag]))
