"""Notify exits of a guest's guest: KVM here takes them, charges the vCPU, and tells whose RIP it is."""

from __future__ import annotations

import pytest

from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess

pytestmark = pytest.mark.usefixtures("injector")


def make(guest: GuestProcess, **keys: int) -> int:
    guest.notify(0, **keys)
    done = guest.wait_for("done")
    assert done["halted"]
    return int(done["code"])


def test_a_nested_stream_is_charged_to_the_nested_guest(fresh: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_notify_window", fresh.vcpus[0].tid) as reader:
        code = make(fresh, exits=50, nested=1)
        records = reader.read()
    assert [(r["rip"], r["streak"], r["guest_mode"]) for r in records] == [(code, n, 1) for n in range(1, 51)]
    assert {record["insn"].to_bytes(15, "little")[:2] for record in records} == {b"\xe6\x75"}
    found = read_vcpu_statistics(fresh, fresh.vcpus[0])
    assert (found["notify_window_exits"], found["notify_window_same_rip_exits"]) == (50, 49)
    assert (found["notify_window_last_rip"], found["notify_window_last_guest_mode"]) == (code, 1)
    # The guest's guest has gone, and its host runs.
    assert found["guest_mode"] == 0


def test_the_same_rip_in_guest_and_nested_guest_are_two_places(fresh: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_notify_window", fresh.vcpus[0].tid) as reader:
        codes = {make(fresh, exits=3), make(fresh, exits=3, nested=1), make(fresh, exits=3)}
        records = reader.read()
    assert len(codes) == 1
    assert [(record["guest_mode"], record["streak"]) for record in records] == [
        (mode, streak) for mode in (0, 1, 0) for streak in (1, 2, 3)
    ]
    found = read_vcpu_statistics(fresh, fresh.vcpus[0])
    assert (found["notify_window_exits"], found["notify_window_same_rip_exits"]) == (9, 6)
    assert found["notify_window_last_guest_mode"] == 0
