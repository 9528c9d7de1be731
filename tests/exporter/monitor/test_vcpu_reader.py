"""What is read of one vCPU: current registers and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from exporter.monitor.vcpu_reader import make_vcpu_reader
from exporter.stalls.kernel_evidence import KernelCounts
from kvm.errors import SourceUnavailable
from kvm.model import EXITS, IRQ_EXITS, NOTIFY_WINDOW_EXITS, RIP_STATISTICS, VcpuState, VmKey

KEY = VmKey(1, 2, 3)


def make_state(statistics: Mapping[str, tuple[int, ...]]) -> VcpuState:
    return VcpuState(7, 70, {"rax": 1, "rip": 2, "rsp": 3}, frozenset({"rip", "rsp"}), statistics)


def test_registers_that_are_stale_are_left_out() -> None:
    counts = {NOTIFY_WINDOW_EXITS: (5,), EXITS: (9,)}
    reading = make_vcpu_reader(lambda key, vcpu_id: make_state(counts | {"guest_mode": (1,)}))(KEY, 7)
    assert reading is not None
    assert (dict(reading.registers), reading.nested) == ({"rax": 1}, True)
    assert (reading.notify_exits, reading.exits) == (5, 9)
    unknown = make_vcpu_reader(lambda key, vcpu_id: make_state(counts))(KEY, 7)
    assert unknown is not None
    assert unknown.nested is None


@pytest.mark.parametrize(
    ("protected", "vm_type", "obstacle"),
    [
        (None, None, ""),
        (False, 0, ""),
        (False, 1, ""),
        (True, 0, "KVM cannot read the registers of this guest"),
        (True, 5, "it is a TD: its RIP cannot be known, and its exits are never traced"),
        (False, 5, "it is a TD: its RIP cannot be known, and its exits are never traced"),
    ],
)
def test_what_must_not_be_traced_says_why(protected: bool | None, vm_type: int | None, obstacle: str) -> None:
    state = make_state({NOTIFY_WINDOW_EXITS: (5,), EXITS: (9,)})
    state = replace(state, state_protected=protected, vm_type=vm_type)
    reading = make_vcpu_reader(lambda key, vcpu_id: state)(KEY, 7)
    assert reading is not None
    assert reading.untraceable == obstacle


def test_of_a_vcpu_without_registers_it_is_not_known_what_it_is() -> None:
    """Its statistics alone were read: it may be a TD."""
    state = VcpuState(7, None, {}, frozenset(), {NOTIFY_WINDOW_EXITS: (5,), EXITS: (9,)})
    reading = make_vcpu_reader(lambda key, vcpu_id: state)(KEY, 7)
    assert reading is not None
    assert reading.untraceable is None
    assert not reading.registers


def test_what_a_patched_kvm_says_is_known_by_name() -> None:
    counts = dict(zip((*RIP_STATISTICS, NOTIFY_WINDOW_EXITS, EXITS, IRQ_EXITS), range(1, 10), strict=True))
    told = make_vcpu_reader(lambda key, vcpu_id: make_state({name: (value,) for name, value in counts.items()}))(KEY, 7)
    assert told is not None
    assert told.kernel is not None
    assert (told.kernel.same_rip_exits, told.kernel.stuck_exits, told.kernel.context_invalid_exits) == (1, 2, 3)
    assert (told.kernel.last_rip, told.kernel.last_guest_mode, told.kernel.streak) == (4, True, 6)
    assert (told.kernel.notify_exits, told.kernel.exits, told.kernel.irq_exits) == (7, 8, 9)
    assert set(RIP_STATISTICS) == {f"notify_window_{name}" for name in KernelCounts.__slots__[:6]}


@pytest.mark.parametrize("missing", [*RIP_STATISTICS, IRQ_EXITS])
def test_a_kvm_that_lacks_one_of_them_says_nothing(missing: str) -> None:
    names = {*RIP_STATISTICS, NOTIFY_WINDOW_EXITS, EXITS, IRQ_EXITS} - {missing}
    reading = make_vcpu_reader(lambda key, vcpu_id: make_state(dict.fromkeys(names, (1,))))(KEY, 7)
    assert reading is not None
    assert reading.kernel is None


def test_a_vcpu_that_is_gone_is_none_and_one_without_statistics_is_no_zero() -> None:
    assert make_vcpu_reader(lambda key, vcpu_id: None)(KEY, 7) is None
    with pytest.raises(SourceUnavailable):
        make_vcpu_reader(lambda key, vcpu_id: make_state({}))(KEY, 7)
