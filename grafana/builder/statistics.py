"""The row about everything else that KVM counts: what explains why a guest is slow, or rules notify exits out.

Its series are there with ``--collector.stats`` only. It sums over vCPUs, so that both levels answer alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from exporter.prometheus.metrics import Metric, MetricType
from exporter.prometheus.stat_metrics import make_metric
from grafana.builder.layout import Panel, Row
from grafana.builder.panels import COUNT, Query, make_graph
from grafana.builder.queries import rate, select
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatUnit

WITHOUT: Final = "not known: the agent has it with --collector.stats"


def _count(name: str) -> Metric:
    return make_metric(StatDescriptor(StatScope.VCPU, name, StatKind.CUMULATIVE), StatScope.VCPU)


def _time(name: str) -> Metric:
    seconds = StatDescriptor(StatScope.VCPU, name, StatKind.CUMULATIVE, StatUnit.SECONDS, 10, -9)
    return make_metric(seconds, StatScope.VCPU)


_GUEST_MODE: Final = make_metric(
    StatDescriptor(StatScope.VCPU, "guest_mode", StatKind.INSTANT, StatUnit.BOOLEAN), StatScope.VCPU
)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A graph of this row: its lines, what each is called besides whose it is, and what they are worth."""

    title: str
    description: str
    lines: dict[str, Metric]
    unit: str = "cps"


_GRAPHS: Final = (
    _Graph(
        "VM exits of all kinds",
        "How often guests were left. Where notify exits are few among them, a slow guest has another cause.",
        {"": _count("exits")},
    ),
    _Graph(
        "Halt polling",
        "CPU time that KVM polled for after a guest halted, for each second. In vain: nothing came, and the CPU was "
        "taken from others (kvm.halt_poll_ns).",
        {"with success": _time("halt_poll_success_ns"), "in vain": _time("halt_poll_fail_ns")},
        "percentunit",
    ),
    _Graph(
        "Asleep after halts",
        "vCPU-seconds a second for which guests had nothing to do, or waited: 100 % is one vCPU that is idle.",
        {"": _time("halt_wait_ns")},
        "percentunit",
    ),
    _Graph(
        "Interrupts injected",
        "Interrupts that KVM gave to guests: timers, disks, networks, and vCPUs that wake each other.",
        {"": _count("irq_injections")},
    ),
    _Graph(
        "Page faults",
        "Faults that KVM was called for, and those it mended by a mapping. Many of a guest that runs for long: its "
        "memory is swapped, migrated, ballooned or logged.",
        {"taken": _count("pf_taken"), "fixed": _count("pf_fixed")},
    ),
    _Graph("TLB flushes", "TLB flushes of vCPUs; each makes memory slower for a while.", {"": _count("tlb_flush")}),
    _Graph(
        "vCPUs in a nested guest",
        "How many vCPUs ran a guest of the guest at the scrape. Only with --collector.stats.level=vcpu.",
        {"": _GUEST_MODE},
        COUNT,
    ),
    _Graph(
        "Preemptions that the guest was told of",
        "The host took the CPU from a vCPU that was running: it wants more CPU time than it gets.",
        {"": _count("preemption_reported")},
    ),
    _Graph(
        "Returns to deliver an interrupt",
        "The VMM asked to get a vCPU back in order to deliver an interrupt itself, without an in-kernel APIC.",
        {"": _count("request_irq_exits")},
    ),
)


def make_statistics_row(number: int, keys: str, whose: str, *, repeat: str = "", **equal: str) -> Row:
    """Return the row, collapsed; its sums are by ``keys`` and called ``whose``, its ids follow ``number``."""

    def make_query(name: str, metric: Metric) -> Query:
        is_counter = metric.type is MetricType.COUNTER
        expr = rate(metric, **equal) if is_counter else select(metric, **equal)
        return Query(f"sum by ({keys}) ({expr})", f"{name} {whose}".strip())

    def make_panel(place: int, graph: _Graph) -> Panel:
        return make_graph(
            number + 1 + place,
            graph.title,
            graph.description,
            [make_query(name, metric) for name, metric in graph.lines.items()],
            unit=graph.unit,
            width=8,
            linear_below=0.01 if graph.unit == "cps" else None,
            no_value=WITHOUT,
        )

    panels = [make_panel(place, graph) for place, graph in enumerate(_GRAPHS)]
    title = "Everything else KVM counts" + (f" of ${{{repeat}:text}}" if repeat else "")
    return Row(number, title, panels, collapsed=True, repeat=repeat)
