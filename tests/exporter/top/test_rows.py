"""Which rows there are, and in which order."""

from __future__ import annotations

from dataclasses import replace

from exporter.top.comparison import NOTIFY_KEY, Comparison
from exporter.top.rows import build_rows, find_subject, name_vm
from exporter.top.view import Opened, Place, View
from kvm.model import Owner
from tests.exporter.top.scene import compare, make_summed, make_vm
from tests.snapshots import make_snapshot, make_unread

QUIET, BUSY, SUMMED = make_vm("quiet", 1), make_vm("busy", 2, notify=(5, 90)), make_summed("old", 3)


def make_comparison() -> Comparison:
    return compare([make_vm("quiet", 1), make_vm("busy", 2, notify=(5, 0)), SUMMED], [QUIET, BUSY, SUMMED])


def list_rows(view: View, comparison: Comparison | None = None) -> list[tuple[str, int | None, str]]:
    rows = build_rows(view, comparison or make_comparison())
    return [(name_vm(row.subject.reading), row.subject.position, row.key) for row in rows]


def test_vms_are_sorted_by_rate_and_what_is_unknown_comes_last() -> None:
    unread = make_unread()
    comparison = compare([QUIET, replace(BUSY, counters=make_vm(notify=(0, 0)).counters)], [unread, QUIET, BUSY])
    assert [name for name, *_ in list_rows(View(), comparison)] == ["busy", "quiet", "firecracker-4343"]
    assert [name for name, *_ in list_rows(View(), Comparison(make_snapshot(QUIET, BUSY)))] == ["quiet", "busy"]


def test_all_vcpus_are_rows_and_sums_stay_rows_of_vms() -> None:
    assert list_rows(View(all_vcpus=True)) == [
        *(("busy", 1, ""), ("quiet", 0, ""), ("quiet", 1, ""), ("busy", 0, ""), ("old", None, "")),
    ]


def test_an_opened_vm_has_its_vcpus_only() -> None:
    opened = View(opened=(Opened(Place(BUSY.vm.key), False),))
    assert list_rows(opened) == [("busy", 1, ""), ("busy", 0, "")]
    assert list_rows(View(opened=(Opened(Place(SUMMED.vm.key), False),))) == []
    assert list_rows(opened, compare([], [QUIET])) == [], "it has gone"


def test_statistics_are_sorted_by_rate_a_vcpu_has_none_of_its_vm() -> None:
    of_vm = list_rows(View(opened=(Opened(Place(BUSY.vm.key), True),)))
    assert [key for *_, key in of_vm][:2] == ["vcpu/exits", NOTIFY_KEY]
    assert [key for *_, key in of_vm][-2:] == ["vcpu/guest_mode", "vm/pages_4k"], "no rates"
    of_vcpu = list_rows(View(opened=(Opened(Place(BUSY.vm.key, 2), True),)))
    assert {key.partition("/")[0] for *_, key in of_vcpu} == {"vcpu"}
    assert list_rows(View(opened=(Opened(Place(BUSY.vm.key, 99), True),))) == []


def test_names_ids_and_owners_are_searched_and_statistics_by_name() -> None:
    owner = Owner("qemu", name="instance-7", project="Shop", display_name="Müller")
    reading = replace(QUIET, vm=replace(QUIET.vm, owner=owner))
    comparison = compare([], [reading, BUSY])
    for search in ("INSTANCE", "shop", "müll", "uuid-1"):
        assert list_rows(View(search=search), comparison) == [("Müller", None, "")], search
    assert list_rows(View(search="nobody"), comparison) == []
    opened = View(opened=(Opened(Place(BUSY.vm.key), True),), search="HALT")
    assert [key for *_, key in list_rows(opened)] == ["vcpu/halt_exits"]


def test_a_place_is_found_again_until_it_has_gone() -> None:
    comparison = make_comparison()
    for view in (View(), View(all_vcpus=True)):
        for row in build_rows(view, comparison):
            assert isinstance(row.identity, Place)
            assert find_subject(comparison, row.identity) == row.subject
    assert find_subject(comparison, Place(QUIET.vm.key._replace(start_ticks=9))) is None, "a reused pid"
