"""Plans which of KVM's statistics are read, and where they stand in the kernel's data blocks. Pure.

A statistic that this program cannot understand is left out, and said: a type or unit that is not known, a value that is
not whole 64-bit numbers of its own. So a newer kernel, or a hostile one, costs single statistics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kvm import abi
from kvm.binary_stats import VALUE_BYTES, Statistic
from kvm.statistics import LeftOut, StatDescriptor, StatKind, StatScope, StatSelection, StatTable, StatUnit

KINDS: Final = {
    abi.KvmStatsType.KVM_STATS_TYPE_CUMULATIVE: StatKind.CUMULATIVE,
    abi.KvmStatsType.KVM_STATS_TYPE_INSTANT: StatKind.INSTANT,
    abi.KvmStatsType.KVM_STATS_TYPE_PEAK: StatKind.PEAK,
    abi.KvmStatsType.KVM_STATS_TYPE_LINEAR_HIST: StatKind.LINEAR_HISTOGRAM,
    abi.KvmStatsType.KVM_STATS_TYPE_LOG_HIST: StatKind.LOG_HISTOGRAM,
}
UNITS: Final = {
    abi.KvmStatsUnit.KVM_STATS_UNIT_NONE: StatUnit.NONE,
    abi.KvmStatsUnit.KVM_STATS_UNIT_BYTES: StatUnit.BYTES,
    abi.KvmStatsUnit.KVM_STATS_UNIT_SECONDS: StatUnit.SECONDS,
    abi.KvmStatsUnit.KVM_STATS_UNIT_CYCLES: StatUnit.CYCLES,
    abi.KvmStatsUnit.KVM_STATS_UNIT_BOOLEAN: StatUnit.BOOLEAN,
}
BASES: Final = {abi.KvmStatsBase.KVM_STATS_BASE_POW10: 10, abi.KvmStatsBase.KVM_STATS_BASE_POW2: 2}
# Nanoseconds are -9, mebibytes 20; beyond this no unit makes sense, and numbers leave the range of a float.
MAX_EXPONENT: Final = 64
# Bits 0 to 63 have a bucket of a logarithmic histogram each, and 0 has one too.
MAX_LOG_BUCKETS: Final = 65
MAX_BUCKETS: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9_]{1,128}")


class NotUnderstood(Exception):
    """A statistic cannot be understood: a word for a label, and a sentence."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class StatPlan(NamedTuple):
    """What is read: ``vm_words`` and ``vcpu_words`` are the places of the values, in 64-bit words of the data block."""

    table: StatTable
    vm_words: tuple[int, ...]
    vcpu_words: tuple[int, ...]


NO_STATISTICS: Final = StatPlan(StatTable(StatScope.VM), (), ())


def describe_statistic(scope: StatScope, raw: Statistic) -> StatDescriptor:
    """Type a statistic by its flags; raises NotUnderstood."""
    if _NAME.fullmatch(raw.name) is None:
        raise NotUnderstood("name", f"its name is none: {raw.name[:40]!r}")
    type_, unit = raw.flags & abi.KVM_STATS_TYPE_MASK, raw.flags & abi.KVM_STATS_UNIT_MASK
    base = raw.flags & abi.KVM_STATS_BASE_MASK
    if raw.flags & ~(abi.KVM_STATS_TYPE_MASK | abi.KVM_STATS_UNIT_MASK | abi.KVM_STATS_BASE_MASK):
        raise NotUnderstood("flags", f"flags {raw.flags:#x} are more than type, unit and base")
    kind, known_unit, known_base = KINDS.get(type_), UNITS.get(unit), BASES.get(base)  # type: ignore[call-overload]
    if kind is None:
        raise NotUnderstood("type", f"type {type_} is not known")
    if known_unit is None:
        raise NotUnderstood("unit", f"unit {unit >> 4} is not known")
    if known_base is None or abs(raw.exponent) > MAX_EXPONENT:
        raise NotUnderstood("base", f"base {base >> 8} with exponent {raw.exponent} is not known")
    descriptor = StatDescriptor(scope, raw.name, kind, known_unit, known_base, raw.exponent, raw.size, raw.bucket_size)
    _check_values(descriptor, raw.offset)
    return descriptor


def _check_values(descriptor: StatDescriptor, offset: int) -> None:
    if offset % VALUE_BYTES:
        raise NotUnderstood("place", f"its values begin at byte {offset}")
    if not descriptor.is_histogram:
        if descriptor.size != 1:
            raise NotUnderstood("size", f"{descriptor.size} values, and it is no histogram")
        return
    most = MAX_LOG_BUCKETS if descriptor.kind is StatKind.LOG_HISTOGRAM else MAX_BUCKETS
    if not 2 <= descriptor.size <= most:
        raise NotUnderstood("buckets", f"{descriptor.size} buckets")
    if descriptor.kind is StatKind.LINEAR_HISTOGRAM and not descriptor.bucket_size:
        raise NotUnderstood("buckets", "buckets without a width")


def plan_statistics(
    selection: StatSelection, vm: Mapping[str, Statistic], vcpu: Mapping[str, Statistic], most_bytes: int
) -> StatPlan:
    """Choose from the kernel's descriptors; a value beyond ``most_bytes`` of a data block is left out."""
    left_out: list[LeftOut] = []
    vm_found = list(_choose(selection, StatScope.VM, vm.values(), most_bytes, left_out))
    vcpu_found = list(_choose(selection, StatScope.VCPU, vcpu.values(), most_bytes, left_out))
    table = StatTable(
        selection.level,
        tuple(descriptor for descriptor, _ in vm_found),
        tuple(descriptor for descriptor, _ in vcpu_found),
        tuple(left_out),
    )
    return StatPlan(
        table, tuple(word for _, words in vm_found for word in words), tuple(w for _, ws in vcpu_found for w in ws)
    )


def _choose(
    selection: StatSelection,
    scope: StatScope,
    statistics: Iterable[Statistic],
    most_bytes: int,
    left_out: list[LeftOut],
) -> Iterable[tuple[StatDescriptor, range]]:
    for raw in statistics:
        key = f"{scope}/{raw.name}"
        if not selection.wants(key):
            continue
        try:
            descriptor = describe_statistic(scope, raw)
            if raw.offset + raw.size * VALUE_BYTES > most_bytes:
                raise NotUnderstood("place", f"its values lie beyond byte {most_bytes}")
        except NotUnderstood as err:
            left_out.append(LeftOut(key, err.reason, str(err)))
            continue
        if scope is StatScope.VCPU and selection.level is StatScope.VM and not descriptor.is_cumulative:
            continue
        first = raw.offset // VALUE_BYTES
        yield descriptor, range(first, first + raw.size)
