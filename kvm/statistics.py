"""The words for everything else that KVM counts: typed descriptors, a choice of them, and one VM's values.

Plain values without I/O, like ``kvm/model.py``. The kernel types its statistics itself (struct kvm_stats_desc,
include/uapi/linux/kvm.h): nothing about single names is remembered here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class StatScope(StrEnum):
    """What a statistic is kept for, and, as a level, what has values of its own."""

    VM = "vm"
    VCPU = "vcpu"


class StatKind(StrEnum):
    """KVM_STATS_TYPE_*: what becomes of a value."""

    CUMULATIVE = "cumulative"
    INSTANT = "instant"
    PEAK = "peak"
    LINEAR_HISTOGRAM = "linear histogram"
    LOG_HISTOGRAM = "logarithmic histogram"


class StatUnit(StrEnum):
    """KVM_STATS_UNIT_*: what a value measures."""

    NONE = ""
    BYTES = "bytes"
    SECONDS = "seconds"
    CYCLES = "cycles"
    BOOLEAN = "boolean"


@dataclass(frozen=True, slots=True)
class StatDescriptor:
    """One statistic as the running kernel describes it.

    A value is a whole number of ``base ** exponent`` units. ``size`` is how many values it has: the buckets of a
    histogram, else 1. ``bucket_size`` is the width of a linear histogram's buckets, else 0.
    """

    scope: StatScope
    name: str
    kind: StatKind
    unit: StatUnit = StatUnit.NONE
    base: int = 10
    exponent: int = 0
    size: int = 1
    bucket_size: int = 0

    @property
    def key(self) -> str:
        """Its name with what it is kept for, as in ``vcpu/halt_exits``: what patterns are searched for in."""
        return f"{self.scope}/{self.name}"

    @property
    def is_histogram(self) -> bool:
        """Whether its values are buckets: how often something was so large."""
        return self.kind in (StatKind.LINEAR_HISTOGRAM, StatKind.LOG_HISTOGRAM)

    @property
    def is_cumulative(self) -> bool:
        """Whether its values only grow, so that they can be summed over the vCPUs of a VM."""
        return self.kind is StatKind.CUMULATIVE or self.is_histogram

    @property
    def scale(self) -> Fraction:
        """How many units 1 is."""
        return Fraction(self.base) ** self.exponent

    @property
    def upper_bounds(self) -> tuple[Fraction, ...]:
        """Where a histogram's buckets end, in units, the last one left out: it has no end.

        Buckets are half-open (Documentation/virt/kvm/api.rst, 4.133): of a linear histogram the Nth counts from
        ``N * bucket_size`` on, of a logarithmic one the first counts zeros, and the Nth what is less than 2**N.
        """
        if self.kind is StatKind.LINEAR_HISTOGRAM:
            return tuple(number * self.bucket_size * self.scale for number in range(1, self.size))
        return tuple(2**number * self.scale for number in range(self.size - 1))


class LeftOut(NamedTuple):
    """A statistic that was wanted and is not read: ``vcpu/NAME``, a word for a label, and a sentence."""

    key: str
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class StatSelection:
    """Which statistics are to be read: those whose ``key`` is wanted, for VMs or for each vCPU too.

    At level ``VM`` a vCPU's statistics are summed over its VM, those that only grow; the others are not read.
    """

    level: StatScope
    wants: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class StatTable:
    """The statistics of a VM and of its vCPUs that one source reads, in the order of their values."""

    level: StatScope
    vm: tuple[StatDescriptor, ...] = ()
    vcpu: tuple[StatDescriptor, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class VmStatistics(NamedTuple):
    """The values of one VM, as ``table`` describes them; ``cut_values`` tells whose they are.

    ``vm`` are the VM's own. At level ``VM`` ``vcpu_sums`` are sums over all its vCPUs; at level ``VCPU`` each element
    of ``vcpu_columns`` has a number of every vCPU that was read, in the order of ``VmCounters.vcpu_ids``. None is
    what was not read.
    """

    table: StatTable
    vm: tuple[int, ...] | None = None
    vcpu_sums: tuple[int, ...] | None = None
    vcpu_columns: tuple[tuple[int, ...], ...] | None = None


def count_values(descriptors: Sequence[StatDescriptor]) -> int:
    """Count the values that these statistics have together."""
    return sum(descriptor.size for descriptor in descriptors)


def cut_values(
    descriptors: Sequence[StatDescriptor], values: Sequence[T]
) -> Iterator[tuple[StatDescriptor, Sequence[T]]]:
    """Yield each statistic with its values, ``size`` of them: numbers, or columns of numbers."""
    at = 0
    for descriptor in descriptors:
        yield descriptor, values[at : at + descriptor.size]
        at += descriptor.size
