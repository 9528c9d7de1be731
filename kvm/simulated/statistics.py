"""What the simulated host has of KVM's statistics besides its counters: some of them, as functions of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from kvm.abi import KvmStatsType, KvmStatsUnit
from kvm.binary_stats import VALUE_BYTES, Statistic
from kvm.statistic_plan import plan_statistics
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatSelection, StatTable, VmStatistics

_NS: Final = KvmStatsUnit.KVM_STATS_UNIT_SECONDS
_COUNT, _INSTANT, _LOG = (
    KvmStatsType.KVM_STATS_TYPE_CUMULATIVE,
    KvmStatsType.KVM_STATS_TYPE_INSTANT,
    KvmStatsType.KVM_STATS_TYPE_LOG_HIST,
)
HISTOGRAM: Final = "halt_wait_hist"
# Flags, exponent, and by how much it grows in a second of a vCPU that is busy half the time; of an instant, its value.
_VCPU: Final[Mapping[str, tuple[int, int, int]]] = {
    "halt_poll_success_ns": (_COUNT | _NS, -9, 12_000_000),
    "halt_poll_fail_ns": (_COUNT | _NS, -9, 4_000_000),
    "halt_wait_ns": (_COUNT | _NS, -9, 480_000_000),
    HISTOGRAM: (_LOG | _NS, -9, 900),
    "pf_taken": (_COUNT, 0, 3),
    "pf_fixed": (_COUNT, 0, 3),
    "tlb_flush": (_COUNT, 0, 20),
    "request_irq_exits": (_COUNT, 0, 1),
    "irq_injections": (_COUNT, 0, 400),
    "preemption_reported": (_COUNT, 0, 7),
    "guest_mode": (_INSTANT | KvmStatsUnit.KVM_STATS_UNIT_BOOLEAN, 0, 0),
    "exits": (_COUNT, 0, 0),
}
_VM: Final[Mapping[str, tuple[int, int, int]]] = {"remote_tlb_flush": (_COUNT, 0, 5), "pages_2m": (_INSTANT, 0, 4_096)}
# How a second's halts are spread over the buckets, of 64 parts: most took 131 to 524 us.
_PARTS: Final = {17: 4, 18: 20, 19: 30, 20: 9, 24: 1}
_BUCKETS: Final = 32


def describe(names: Mapping[str, tuple[int, int, int]]) -> dict[str, Statistic]:
    """Describe statistics as a kernel would."""
    described: dict[str, Statistic] = {}
    offset = 0
    for name, (flags, exponent, _) in names.items():
        size = _BUCKETS if name == HISTOGRAM else 1
        described[name] = Statistic(name, flags, exponent, size, offset, 0)
        offset += size * VALUE_BYTES
    return described


def plan(selection: StatSelection) -> StatTable:
    """Choose from the statistics of the simulated host."""
    return plan_statistics(selection, describe(_VM), describe(_VCPU), 1 << 16).table


def count(descriptor: StatDescriptor, seconds: float, exits: int) -> tuple[int, ...]:
    """Return a statistic's values after so many seconds."""
    if descriptor.name == "exits":
        return (exits,)
    _, _, per_second = (_VM if descriptor.scope is StatScope.VM else _VCPU)[descriptor.name]
    if descriptor.kind is StatKind.INSTANT:
        return (per_second,)
    grown = math.floor(seconds * per_second)
    if descriptor.is_histogram:
        return tuple(grown * _PARTS.get(bucket, 0) // 64 for bucket in range(_BUCKETS))
    return (grown,)


def read_statistics(table: StatTable, seconds: float, exits: Sequence[int], *, sum_only: bool) -> VmStatistics:
    """Read a VM whose vCPUs have taken so many exits; with ``sum_only`` it has no numbers of single vCPUs."""
    own = tuple(value for one in table.vm for value in count(one, seconds, 0)) or None
    # Each vCPU of a VM is a little less busy than the one before it.
    rows = [
        tuple(value for one in table.vcpu for value in count(one, seconds / (1 + index / 4), of_vcpu))
        for index, of_vcpu in enumerate(exits)
    ]
    columns: list[tuple[int, ...]] = list(zip(*rows, strict=True))
    if table.level is StatScope.VM:
        return VmStatistics(table, own, tuple(map(sum, columns)) or None)
    return VmStatistics(table, own, None, None if sum_only else tuple(columns) or None)
