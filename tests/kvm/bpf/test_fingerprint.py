"""A vCPU of our own that is read otherwise than it is shows that the types are wrong, and says in what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvm.bpf.fingerprint import Fingerprint, refuse_own_vcpu
from kvm.bpf.vcpu_decode import REGISTERS
from kvm.model import VcpuState, VmCounters

VALUES = {"exits": (0,), "fpu_reload": (101,), "halt_wait_hist": (0, 0)}
NUMBERS = {name: 0x1000 + n for n, name in enumerate(REGISTERS)}
OURS = Fingerprint("fpu_reload", 173, 4711, (12345, 1), VALUES, {"mmu_flooded": (7,)}, NUMBERS)
COUNTERS = VmCounters((173,), (4711,), {"fpu_reload": (101,)}, {}, 12345, 1)
STATE = VcpuState(173, 4711, NUMBERS, frozenset(), VALUES)


def test_what_is_read_as_it_is_has_no_differences() -> None:
    assert list(OURS.find_differences(COUNTERS)) == []
    assert list(OURS.find_state_differences(STATE)) == []


def test_a_kernel_from_before_notify_exits_has_no_window_to_compare() -> None:
    old = COUNTERS._replace(notify_window_cycles=None, notify_flags=None)
    assert list(replace(OURS, notify=(0, 0)).find_differences(old)) == []


@pytest.mark.parametrize(
    ("counters", "difference"),
    [
        (None, "it is not found among the vCPUs of its VM"),
        (VmCounters(), "it is not found among the vCPUs of its VM"),
        (COUNTERS._replace(vcpu_ids=(0,)), "its number reads 0 and is 173"),
        (COUNTERS._replace(tids=(None,)), "its thread reads None and is 4711"),
        (COUNTERS._replace(per_vcpu={"fpu_reload": (0,)}), "fpu_reload reads (0,) and is (101,)"),
        (COUNTERS._replace(notify_flags=0), "notify window and flags reads (12345, 0) and is (12345, 1)"),
    ],
)
def test_each_wrong_number_of_a_look_is_told(counters: VmCounters | None, difference: str) -> None:
    assert list(OURS.find_differences(counters)) == [difference]


@pytest.mark.parametrize(
    ("state", "difference"),
    [
        (None, "it is not found by its number"),
        (replace(STATE, tid=1), "its thread reads 1 and is 4711"),
        (replace(STATE, statistics=VALUES | {"exits": (7,)}), "exits reads (7,) and is (0,)"),
        (replace(STATE, registers=NUMBERS | {"rip": 0}), f"rip reads 0 and is {NUMBERS['rip']}"),
        (replace(STATE, stale=frozenset({"rip"})), "stale registers reads ['rip'] and is []"),
    ],
)
def test_each_wrong_number_of_a_vcpu_is_told(state: VcpuState | None, difference: str) -> None:
    assert list(OURS.find_state_differences(state)) == [difference]


def test_a_refusal_names_three_and_counts_the_others() -> None:
    refusal = refuse_own_vcpu(["a", "b", "c", "d", "e"])
    assert refusal.reason.endswith("than the kernel's types say: of a vCPU of our own, a; b; c; and 2 more")
    assert "CONFIG_DEBUG_INFO_BTF_MODULES" in refusal.remedy
