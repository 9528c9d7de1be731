"""Descriptors of a kernel become a plan of what is read; what is not understood is left out, and said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm import abi
from kvm.binary_stats import Statistic
from kvm.statistic_plan import NotUnderstood, describe_statistic, plan_statistics
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatSelection, StatUnit
from tests.known_statistics import plan_captured, read_captured

EVERYTHING = StatSelection(StatScope.VCPU, lambda _key: True)


def make_raw(name: str = "exits", flags: int = 0, **others: int) -> Statistic:
    return replace(Statistic(name, flags, exponent=0, size=1, offset=0, bucket_size=0), **others)  # type: ignore[arg-type]


def test_a_real_kernels_statistics_are_typed_by_its_own_word() -> None:
    table = plan_captured(StatScope.VCPU)
    found = {descriptor.name: descriptor for descriptor in table.vcpu}
    assert table.left_out == ()
    assert found.keys() == read_captured(StatScope.VCPU).keys()
    assert {descriptor.name for descriptor in table.vm} == read_captured(StatScope.VM).keys()
    assert found["exits"] == StatDescriptor(StatScope.VCPU, "exits", StatKind.CUMULATIVE)
    assert found["guest_mode"] == StatDescriptor(StatScope.VCPU, "guest_mode", StatKind.INSTANT, StatUnit.BOOLEAN)
    seconds = (StatUnit.SECONDS, 10, -9)
    assert found["halt_wait_ns"] == StatDescriptor(StatScope.VCPU, "halt_wait_ns", StatKind.CUMULATIVE, *seconds)
    assert found["halt_wait_hist"] == StatDescriptor(
        StatScope.VCPU, "halt_wait_hist", StatKind.LOG_HISTOGRAM, *seconds, size=32
    )


def test_words_are_where_the_values_stand() -> None:
    vcpu = {"a": make_raw("a", offset=16), "h": make_raw("h", 4, size=3, offset=24), "b": make_raw("b", offset=0)}
    plan = plan_statistics(EVERYTHING, {"v": make_raw("v", offset=8)}, vcpu, 4096)
    assert (plan.vm_words, plan.vcpu_words) == ((1,), (2, 3, 4, 5, 0))
    assert [descriptor.key for descriptor in plan.table.vm] == ["vm/v"]


def test_only_what_is_wanted_is_read() -> None:
    asked: list[str] = []

    def wants(key: str) -> bool:
        asked.append(key)
        return key == "vcpu/b"

    raw = {"a": make_raw("a"), "b": make_raw("b", offset=8)}
    plan = plan_statistics(StatSelection(StatScope.VCPU, wants), {"b": make_raw("b")}, raw, 4096)
    assert asked == ["vm/b", "vcpu/a", "vcpu/b"]
    assert (plan.vm_words, plan.vcpu_words) == ((), (1,))


def test_at_the_level_of_vms_only_what_grows_is_summed() -> None:
    raw = {
        name: make_raw(name, flags, size=2 if flags > 2 else 1, bucket_size=1)
        for name, flags in zip("ciplh", range(5), strict=True)
    }
    plan = plan_statistics(StatSelection(StatScope.VM, lambda _key: True), raw, raw, 4096)
    assert [descriptor.name for descriptor in plan.table.vcpu] == ["c", "l", "h"]
    assert [descriptor.name for descriptor in plan.table.vm] == list("ciplh")
    assert plan.table.left_out == ()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (make_raw("not-a-name"), "name"),
        (make_raw('x"} 1\nkvm_vm_info{'), "name"),
        (make_raw("x" * 129), "name"),
        (make_raw(flags=0x5), "type"),
        (make_raw(flags=0x50), "unit"),
        (make_raw(flags=0x200), "base"),
        (make_raw(flags=0x1000), "flags"),
        (make_raw(exponent=65), "base"),
        (make_raw(exponent=-32768), "base"),
        (make_raw(offset=4), "place"),
        (make_raw(offset=4096), "place"),
        (make_raw(size=0), "size"),
        (make_raw(size=2), "size"),
        (make_raw(flags=0x4, size=1), "buckets"),
        (make_raw(flags=0x4, size=66), "buckets"),
        (make_raw(flags=0x3, size=8, bucket_size=0), "buckets"),
        (make_raw(flags=0x3, size=257, bucket_size=1), "buckets"),
    ],
)
def test_what_is_not_understood_costs_itself_and_is_said(raw: Statistic, reason: str) -> None:
    plan = plan_statistics(EVERYTHING, {}, {raw.name: raw, "good": make_raw("good", offset=8)}, 4096)
    assert [descriptor.name for descriptor in plan.table.vcpu] == ["good"]
    ((key, word, text),) = plan.table.left_out
    assert (key, word) == (f"vcpu/{raw.name}", reason)
    assert text


@given(
    st.builds(
        Statistic,
        st.just("x"),
        *[st.integers(0, 2**32 - 1), st.integers(-(2**15), 2**15 - 1)],
        st.integers(0, 2**16 - 1),
        *[st.integers(0, 2**32 - 1)] * 2,
    )
)
def test_whatever_a_kernel_says_is_understood_or_refused(raw: Statistic) -> None:
    try:
        descriptor = describe_statistic(StatScope.VM, raw)
    except NotUnderstood:
        return
    assert raw.flags < 0x1000
    assert raw.flags & abi.KVM_STATS_TYPE_MASK in list(abi.KvmStatsType)
    assert all(0 < float(bound) < float("inf") for bound in (*descriptor.upper_bounds, descriptor.scale))
