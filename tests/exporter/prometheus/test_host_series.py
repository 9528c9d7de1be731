"""What is told of a host as a whole, and what is left out because it is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.prometheus.exposition import render_text
from exporter.prometheus.host_series import build_host_families, build_snapshot_families, count_vms
from kvm.model import Protection
from tests.snapshots import HIDDEN, INTEL, make_reading, make_snapshot, make_unread


def read_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    ("change", "total", "absent"),
    [
        ({}, 7, ()),
        ({}, None, ("kvm_host_notify_window_exits_total",)),
        ({"notify_supported": None}, 7, ("kvm_host_notify_supported",)),
        ({"cpu_unknown_reason": "no /proc/cpuinfo"}, 7, ("kvm_host_info",)),
    ],
)
def test_what_is_not_known_of_the_host_is_absent(
    change: dict[str, object], total: int | None, absent: tuple[str, ...]
) -> None:
    snapshot = replace(make_snapshot(make_reading()), host=replace(INTEL, **change), vms_over_budget=3)  # type: ignore[arg-type]
    lines = read_lines(render_text(build_host_families(snapshot, total)))
    names = ["kvm_host_info", "kvm_host_notify_supported", "kvm_host_notify_window_exits_total"]
    assert [any(line.startswith(name) for line in lines) for name in names] == [name not in absent for name in names]
    assert "kvm_host_vms_over_budget 3" in lines


def test_vcpus_are_counted_only_where_the_number_of_each_vm_is_known() -> None:
    armed = replace(make_reading(), protection=Protection.ARMED)
    lines = read_lines(render_text(count_vms([armed, make_unread(), replace(make_unread(), vcpu_count=None)])))
    assert 'kvm_host_vms{protection="armed"} 1' in lines
    assert 'kvm_host_vcpus{protection="armed"} 2' in lines
    assert 'kvm_host_vms{protection="unknown"} 2' in lines
    assert not any(line.startswith('kvm_host_vcpus{protection="unknown"}') for line in lines)


def test_why_a_snapshot_is_not_complete_is_told_once_for_each_reason() -> None:
    snapshot = make_snapshot(make_reading())
    whole = read_lines(render_text(build_snapshot_families(snapshot)))
    partial = read_lines(render_text(build_snapshot_families(replace(snapshot, blind_spots=HIDDEN * 2))))
    assert "kvm_exporter_complete 1" in whole
    assert "kvm_exporter_complete 0" in partial
    assert [line for line in partial if "reason" in line] == [
        'kvm_exporter_incomplete_reason_info{reason="hidden_processes"} 1'
    ]
