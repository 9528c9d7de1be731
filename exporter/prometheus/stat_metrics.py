"""How KVM's statistics are called as metrics: by the kernel's names, letter for letter, and what it says of each. Pure.

A cumulative statistic is a counter, an instant or a peak a gauge, a histogram a histogram of buckets alone: KVM keeps
no sum of what it has put into them, and OpenMetrics 1.0.0 has no ``_count`` without a ``_sum``; the count is the bucket
``+Inf``. A unit goes behind the name, in base units: the kernel's exponent is applied to the values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from exporter.prometheus.metrics import Metric, MetricType
from exporter.prometheus.stat_help import describe_name
from kvm.statistics import LeftOut, StatDescriptor, StatKind, StatScope, StatTable, StatUnit

SUFFIXES: Final = {
    MetricType.COUNTER: ("_total", "_created"),
    MetricType.GAUGE: ("",),
    MetricType.HISTOGRAM: ("_bucket", "_count", "_sum", "_created"),
}
# An address of the guest is for those only who may see RIPs (exporter/web/access.py), and metrics are for everybody.
SECRET: Final = frozenset({"vcpu/notify_window_last_rip"})
_UNIT_TEXT: Final = {
    StatUnit.NONE: "",
    StatUnit.BYTES: ", in bytes",
    StatUnit.SECONDS: ", in seconds",
    StatUnit.CYCLES: ", in cycles",
    StatUnit.BOOLEAN: ": 1 where it is so, else 0",
}
_SCOPE_TEXT: Final = {StatScope.VM: "VM", StatScope.VCPU: "vCPU"}
_KIND_TEXT: Final = {
    StatKind.CUMULATIVE: "how often or how much, since the VM was made",
    StatKind.INSTANT: "its value now",
    StatKind.PEAK: "the greatest value so far",
    StatKind.LINEAR_HISTOGRAM: "how often it was so large, since the VM was made",
    StatKind.LOG_HISTOGRAM: "how often it was so large, since the VM was made",
}


@dataclass(frozen=True, slots=True)
class NamedTable:
    """A table of statistics with the metric of each, None where its name is taken by one before it."""

    vm: tuple[Metric | None, ...]
    vcpu: tuple[Metric | None, ...]
    left_out: tuple[LeftOut, ...]


def name_family(descriptor: StatDescriptor) -> str:
    """Return the name of the family, which a counter's ``_total`` and a histogram's ``_bucket`` follow."""
    name = f"kvm_{descriptor.scope}_stat_{descriptor.name}"
    if descriptor.kind is StatKind.CUMULATIVE:
        name = name.removesuffix("_total")
    has_suffix = descriptor.unit in (StatUnit.NONE, StatUnit.BOOLEAN) or name.endswith(f"_{descriptor.unit}")
    return name if has_suffix else f"{name}_{descriptor.unit}"


def make_metric(descriptor: StatDescriptor, level: StatScope) -> Metric:
    """Declare the metric of a statistic; at level ``VM`` a vCPU's has the label ``vm`` alone."""
    family = name_family(descriptor)
    is_counter = descriptor.kind is StatKind.CUMULATIVE
    other = MetricType.HISTOGRAM if descriptor.is_histogram else MetricType.GAUGE
    of_vcpu = descriptor.scope is StatScope.VCPU
    labels = ("vcpu", "vm") if of_vcpu and level is StatScope.VCPU else ("vm",)
    unit = "" if descriptor.unit is StatUnit.BOOLEAN else str(descriptor.unit)
    text = _describe(descriptor, is_summed=of_vcpu and "vcpu" not in labels)
    return Metric(
        f"{family}_total" if is_counter else family, MetricType.COUNTER if is_counter else other, text, labels, unit
    )


def _describe(descriptor: StatDescriptor, *, is_summed: bool) -> str:
    whose = "summed over all vCPUs of a VM" if is_summed else f"of a {_SCOPE_TEXT[descriptor.scope]}"
    meaning = describe_name(descriptor.key) or f"{_KIND_TEXT[descriptor.kind]}{_UNIT_TEXT[descriptor.unit]}"
    return f"KVM stat {descriptor.name} {whose}: {meaning}."


def name_statistics(table: StatTable) -> NamedTable:
    """Give each statistic of a table its metric; one whose names another has is left out."""
    taken: set[str] = set()
    left_out: list[LeftOut] = []

    def choose(descriptors: Iterable[StatDescriptor]) -> tuple[Metric | None, ...]:
        return tuple(_claim(descriptor, table.level, taken, left_out) for descriptor in descriptors)

    vm, vcpu = choose(table.vm), choose(table.vcpu)
    return NamedTable(vm, vcpu, table.left_out + tuple(left_out))


def _claim(descriptor: StatDescriptor, level: StatScope, taken: set[str], left_out: list[LeftOut]) -> Metric | None:
    if descriptor.key in SECRET:
        left_out.append(LeftOut(descriptor.key, "secret", "it is an address of the guest, which metrics do not show"))
        return None
    metric = make_metric(descriptor, level)
    names = {metric.family, *(f"{metric.family}{suffix}" for suffix in SUFFIXES[metric.type])}
    if names & taken:
        left_out.append(LeftOut(descriptor.key, "same_name", f"another statistic is called {metric.name} too"))
        return None
    taken |= names
    return metric
