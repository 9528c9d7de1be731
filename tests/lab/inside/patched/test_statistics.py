"""The statistics of the patched KVM, against what the guest did and what kvm:kvm_exit shows of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.vm_discovery import Discovery
from kvm.read_errors import Subject
from tests.lab.inside.agent import run_once
from tests.lab.inside.kvm_readers import find_vm_directory, read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess

EXIT_REASON_NOTIFY = 75
HIDE_RIP, COUNT_IN_RCX, TO_USER, FROM_ENCLAVE = 1, 2, 4, 8
CONTEXT_INVALID = 1
NAMES = (
    *("notify_window_exits", "notify_window_same_rip_exits", "notify_window_stuck_exits"),
    *("notify_window_context_invalid_exits", "notify_window_last_rip", "notify_window_last_guest_mode"),
    "notify_window_streak",
)

pytestmark = pytest.mark.usefixtures("injector")


def refuse_trouble(whose: Subject, kind: str, message: str) -> None:
    raise AssertionError((whose, kind, message))


def read(guest: GuestProcess, index: int = 0) -> dict[str, int]:
    """The statistics of a vCPU's notify exits, with the common part of their names left out."""
    statistics = read_vcpu_statistics(guest, guest.vcpus[index])
    return {name.removeprefix("notify_window_"): statistics[name] for name in NAMES}


def make(guest: GuestProcess, **keys: int) -> int:
    """Has the first vCPU make notify exits; returns the address of its first instruction."""
    guest.notify(0, **keys)
    return int(guest.wait_for("done")["code"])


def test_new_statistics_stand_behind_all_others(fresh: GuestProcess) -> None:
    assert tuple(read_vcpu_statistics(fresh, fresh.vcpus[0]))[-len(NAMES) :] == NAMES


def test_a_vcpu_without_notify_exits_has_nothing_but_zeros(fresh: GuestProcess) -> None:
    fresh.run(10)
    assert set(read(fresh).values()) == {0}


def test_a_stream_repeats_but_for_its_first_exit(fresh: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", fresh.vcpus[0].tid) as reader:
        code = make(fresh, exits=1000)
        reasons = [record["exit_reason"] for record in reader.read()]
    adjacent = sum(pair == (EXIT_REASON_NOTIFY, EXIT_REASON_NOTIFY) for pair in pairwise(reasons))
    assert read(fresh) == {
        "exits": 1000,
        "same_rip_exits": 999,
        # Interrupts of the host come between.
        "stuck_exits": adjacent,
        "context_invalid_exits": 0,
        "last_rip": code,
        "last_guest_mode": 0,
        "streak": 1000,
    }
    assert adjacent > 500
    assert set(read(fresh, 1).values()) == {0}


def test_rep_repeats_and_is_not_stuck(fresh: GuestProcess) -> None:
    make(fresh, flags=COUNT_IN_RCX, rcx=50)
    found = read(fresh)
    assert (found["exits"], found["same_rip_exits"], found["stuck_exits"], found["streak"]) == (50, 49, 0, 50)


def test_a_guest_that_goes_on_repeats_nothing(fresh: GuestProcess) -> None:
    code = make(fresh, rips=4, rounds=50)
    found = read(fresh)
    assert (found["exits"], found["same_rip_exits"], found["stuck_exits"], found["streak"]) == (200, 0, 0, 1)
    assert found["last_rip"] == code + 6


def test_a_loop_with_other_exits_is_not_stuck(fresh: GuestProcess) -> None:
    make(fresh, rounds=20, other=2)
    found = read(fresh)
    assert (found["exits"], found["same_rip_exits"], found["stuck_exits"]) == (20, 19, 0)


@pytest.mark.parametrize(
    ("keys", "context_invalid"),
    [
        ({"rounds": 20, "qualification": CONTEXT_INVALID}, 20),
        ({"exits": 20, "flags": HIDE_RIP}, 0),
        ({"exits": 20, "flags": FROM_ENCLAVE}, 0),
    ],
    ids=["context-invalid", "hidden-rip", "enclave"],
)
def test_what_has_no_rip_is_no_repeat(fresh: GuestProcess, keys: dict[str, int], context_invalid: int) -> None:
    make(fresh, exits=3)
    make(fresh, **keys)
    unknown = read(fresh)
    assert unknown["exits"] == 23
    assert unknown["context_invalid_exits"] == context_invalid
    assert (unknown["same_rip_exits"], unknown["streak"], unknown["last_rip"]) == (2, 0, 0)
    assert unknown["stuck_exits"] <= 2
    # And it ends what was before: the next known RIP is the first of its streak.
    make(fresh, exits=3)
    known = read(fresh)
    assert (known["same_rip_exits"], known["streak"]) == (4, 3)


def test_an_exit_that_the_vmm_gets_counts_as_any_other(fresh: GuestProcess) -> None:
    fresh.notify(0, rounds=5, flags=TO_USER)
    assert fresh.wait_for("done")["notify_user_exits"] == 5
    assert (read(fresh)["exits"], read(fresh)["same_rip_exits"]) == (5, 4)


def test_debugfs_shows_rip_and_streak_of_each_vcpu(fresh: GuestProcess) -> None:
    fresh.notify(0, exits=12)
    fresh.notify(1, exits=34)
    codes = {done["vcpu"]: done["code"] for done in (fresh.wait_for("done"), fresh.wait_for("done"))}
    for index, streak in ((0, 12), (1, 34)):
        directory = find_vm_directory(fresh) / f"vcpu{fresh.vcpus[index].vcpu_id}"
        assert int((directory / "notify_window_last_rip").read_text(encoding="ascii"), 16) == codes[index]
        assert int((directory / "notify_window_streak").read_text(encoding="ascii")) == streak


@pytest.mark.parametrize("source", ["bpf", "stats_fd"])
def test_the_agent_reads_right_what_has_grown(fresh: GuestProcess, source: str) -> None:
    make(fresh, exits=321)
    vms = json.loads(run_once("--format=json", f"--collector.source={source}"))["vms"]
    (vm,) = (vm for vm in vms if vm["pid"] == fresh.pid)
    assert vm["source"] == source
    seen = [(vcpu["vcpu_id"], vcpu["tid"], vcpu["notify_window_exits"], vcpu["exits"]) for vcpu in vm["vcpus"]]
    own = [read_vcpu_statistics(fresh, vcpu)["exits"] for vcpu in fresh.vcpus]
    assert seen == [(v.vcpu_id, v.tid, n, e) for v, n, e in zip(fresh.vcpus, (321, 0), own, strict=True)]


def test_single_vcpus_are_read_by_stats_fds_with_all_that_kvm_tells(fresh: GuestProcess) -> None:
    make(fresh, exits=321)
    source, discovery = StatsFdSource(("exits",), refuse_trouble), Discovery(Path("/proc"), refuse_trouble)
    source.open()
    assert source.tells_rips
    (vm,) = (vm for vm in discovery.find_vms() if vm.key.pid == fresh.pid)
    source.read([vm])
    for vcpu in fresh.vcpus:
        state = source.read_vcpu(vm.key, vcpu.vcpu_id)
        assert state is not None
        assert {name: values[0] for name, values in state.statistics.items()} == read_vcpu_statistics(fresh, vcpu)
    discovery.close()


def test_parameters_change_nothing_by_default() -> None:
    parameters = Path("/sys/module/kvm/parameters")
    assert (parameters / "notify_window_warn").read_text(encoding="ascii") == "N\n"
    assert (parameters / "notify_window_min").read_text(encoding="ascii") == "0\n"
