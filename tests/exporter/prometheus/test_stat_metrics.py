"""How KVM's statistics are called: the kernel's names, and what it says of type and unit."""

from __future__ import annotations

import re

import pytest

from exporter.prometheus.metrics import METRICS, MetricType
from exporter.prometheus.stat_help import HELP
from exporter.prometheus.stat_metrics import make_metric, name_statistics
from kvm.statistics import LeftOut, StatDescriptor, StatKind, StatScope, StatTable, StatUnit

VM, VCPU = StatScope.VM, StatScope.VCPU
NS = (StatUnit.SECONDS, 10, -9)


@pytest.mark.parametrize(
    ("descriptor", "name", "type_", "unit"),
    [
        (StatDescriptor(VCPU, "exits", StatKind.CUMULATIVE), "kvm_vcpu_stat_exits_total", "counter", ""),
        (StatDescriptor(VM, "pages_4k", StatKind.INSTANT), "kvm_vm_stat_pages_4k", "gauge", ""),
        (StatDescriptor(VM, "max_size", StatKind.PEAK), "kvm_vm_stat_max_size", "gauge", ""),
        (
            StatDescriptor(VCPU, "halt_wait_ns", StatKind.CUMULATIVE, *NS),
            "kvm_vcpu_stat_halt_wait_ns_seconds_total",
            "counter",
            "seconds",
        ),
        (
            StatDescriptor(VCPU, "halt_wait_hist", StatKind.LOG_HISTOGRAM, *NS, size=32),
            "kvm_vcpu_stat_halt_wait_hist_seconds",
            "histogram",
            "seconds",
        ),
        (
            StatDescriptor(VM, "dirty", StatKind.PEAK, StatUnit.BYTES, 2, 20),
            "kvm_vm_stat_dirty_bytes",
            "gauge",
            "bytes",
        ),
        (StatDescriptor(VM, "x_bytes", StatKind.INSTANT, StatUnit.BYTES), "kvm_vm_stat_x_bytes", "gauge", "bytes"),
        (
            StatDescriptor(VCPU, "steal", StatKind.CUMULATIVE, StatUnit.CYCLES),
            "kvm_vcpu_stat_steal_cycles_total",
            "counter",
            "cycles",
        ),
        (
            StatDescriptor(VCPU, "guest_mode", StatKind.INSTANT, StatUnit.BOOLEAN),
            "kvm_vcpu_stat_guest_mode",
            "gauge",
            "",
        ),
        (StatDescriptor(VCPU, "seen_total", StatKind.CUMULATIVE), "kvm_vcpu_stat_seen_total", "counter", ""),
    ],
    ids=lambda value: value.name if isinstance(value, StatDescriptor) else "",
)
def test_a_name_is_the_kernels_with_what_it_says_of_type_and_unit(
    descriptor: StatDescriptor, name: str, type_: str, unit: str
) -> None:
    metric = make_metric(descriptor, VCPU)
    assert (metric.name, metric.type, metric.unit) == (name, type_, unit)
    assert metric.family.endswith(unit)


def test_labels_and_help_say_whose_it_is() -> None:
    exits = StatDescriptor(VCPU, "exits", StatKind.CUMULATIVE)
    assert make_metric(exits, VCPU).labels == ("vcpu", "vm")
    assert make_metric(exits, VCPU).help == "KVM stat exits of a vCPU: VM exits of all kinds."
    assert make_metric(exits, VM).labels == ("vm",)
    assert make_metric(exits, VM).help == "KVM stat exits summed over all vCPUs of a VM: VM exits of all kinds."
    unknown = StatDescriptor(VM, "steal_ns", StatKind.CUMULATIVE, *NS)
    assert make_metric(unknown, VM).labels == ("vm",)
    assert make_metric(unknown, VM).help == (
        "KVM stat steal_ns of a VM: how often or how much, since the VM was made, in seconds."
    )


@pytest.mark.parametrize("text", HELP.values(), ids=HELP)
def test_what_is_known_of_a_name_is_part_of_a_sentence(text: str) -> None:
    assert not text.endswith(".")
    assert re.match(r"[a-z]|[A-Z]{2}|L1", text), "no capital, but for an abbreviation"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (StatDescriptor(VCPU, "x", StatKind.CUMULATIVE), StatDescriptor(VCPU, "x_total", StatKind.INSTANT)),
        (StatDescriptor(VCPU, "x", StatKind.CUMULATIVE), StatDescriptor(VCPU, "x_total", StatKind.CUMULATIVE)),
        (StatDescriptor(VCPU, "x", StatKind.CUMULATIVE, *NS), StatDescriptor(VCPU, "x_seconds", StatKind.CUMULATIVE)),
        (StatDescriptor(VCPU, "x", StatKind.LOG_HISTOGRAM, size=3), StatDescriptor(VCPU, "x_count", StatKind.INSTANT)),
        (StatDescriptor(VCPU, "x_sum", StatKind.INSTANT), StatDescriptor(VCPU, "x", StatKind.LOG_HISTOGRAM, size=3)),
    ],
)
def test_of_two_that_would_have_one_name_the_second_is_left_out(first: StatDescriptor, second: StatDescriptor) -> None:
    named = name_statistics(StatTable(VCPU, vcpu=(first, second)))
    kept, dropped = named.vcpu
    assert kept is not None
    assert dropped is None
    assert [(left.key, left.reason) for left in named.left_out] == [(second.key, "same_name")]


def test_a_vm_and_its_vcpus_have_names_of_their_own() -> None:
    same = [StatDescriptor(scope, "x", StatKind.CUMULATIVE) for scope in (VM, VCPU)]
    named = name_statistics(StatTable(VCPU, (same[0],), (same[1],), (LeftOut("vm/odd", "unit", "?"),)))
    assert [metric and metric.name for metric in (*named.vm, *named.vcpu)] == [
        "kvm_vm_stat_x_total",
        "kvm_vcpu_stat_x_total",
    ]
    assert [left.key for left in named.left_out] == ["vm/odd"]


def test_an_address_of_the_guest_is_no_metric() -> None:
    rip = StatDescriptor(VCPU, "notify_window_last_rip", StatKind.INSTANT)
    named = name_statistics(StatTable(VCPU, vcpu=(rip,)))
    assert named.vcpu == (None,)
    assert [left.reason for left in named.left_out] == ["secret"]


def test_no_other_metric_begins_so() -> None:
    assert not [metric.name for metric in METRICS if metric.name.startswith(("kvm_vm_stat_", "kvm_vcpu_stat_"))]
    assert not [metric.name for metric in METRICS if metric.type is MetricType.HISTOGRAM]
