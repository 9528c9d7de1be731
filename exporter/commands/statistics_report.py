"""``once --stats``: every statistic that KVM keeps, of VMs or of each vCPU, with its rate over a moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Final, TypeVar

from exporter.commands.columns import render_columns
from exporter.host_summary import describe_blind_spots
from exporter.top.cells import UNKNOWN, render_amount, render_value
from exporter.top.comparison import Comparison, Subject
from exporter.untrusted_text import clean_name
from kvm.model import VmReading
from kvm.statistics import StatDescriptor, cut_values

T = TypeVar("T")

MAX_NAME: Final = 40
# The source works, and has no such statistic, or no other than histograms.
NOTHING_READ: Final = "nothing was read that --collector.stats.include and .exclude leave; histograms: --format=json"
_HEADER: Final = ("VM", "NAME", "VCPU", "STATISTIC", "VALUE", "PER SECOND", "SOURCE")
_RIGHT: Final = {"VCPU", "VALUE", "PER SECOND"}


def render_statistics(comparison: Comparison) -> str:
    """Render a table with a row a statistic, of each VM, or of each vCPU where these were read; no histograms."""
    rows = [row for reading in comparison.now.readings for row in _build_rows(comparison, reading)]
    told = f"VMs may be missing: {describe_blind_spots(comparison.now)}\n" if comparison.now.blind_spots else ""
    return (render_columns(_HEADER, rows, _RIGHT) if rows else "no VM found\n") + told


def _build_rows(comparison: Comparison, reading: VmReading) -> Sequence[Sequence[object]]:
    who = (reading.vm.id, clean_name(reading.vm.owner.name, MAX_NAME) or UNKNOWN)
    rows = [
        (*who, which, *_render(comparison, subject, descriptor), reading.source)
        for which, subject, descriptor in _list_read(reading)
    ]
    return rows or [(*who, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, _explain_missing(comparison, reading))]


def _render(comparison: Comparison, subject: Subject, descriptor: StatDescriptor) -> tuple[str, str, str]:
    rate = comparison.find_rate(subject, descriptor.key)
    value = render_value(comparison.find_value(subject, descriptor.key), descriptor)
    return descriptor.key, value, render_amount(rate, descriptor)


def _list_read(reading: VmReading) -> Iterator[tuple[object, Subject, StatDescriptor]]:
    """Yield the statistics that were read of a VM and of its vCPUs, without histograms, and which vCPU it is."""
    statistics = reading.counters.statistics
    if statistics is None:
        return
    whole = Subject(reading)
    if statistics.vm:
        yield from ((UNKNOWN, whole, descriptor) for descriptor in _leave_histograms_out(statistics.table.vm))
    for descriptor in _leave_histograms_out(statistics.table.vcpu):
        if statistics.vcpu_columns:
            for position, vcpu in enumerate(reading.vcpus):
                yield vcpu.index, Subject(reading, position), descriptor
        elif statistics.vcpu_sums:
            yield "all", whole, descriptor


def _leave_histograms_out(descriptors: Iterable[StatDescriptor]) -> Iterable[StatDescriptor]:
    return (descriptor for descriptor in descriptors if not descriptor.is_histogram)


def _cut(
    descriptors: Sequence[StatDescriptor], values: Sequence[T] | None
) -> Iterable[tuple[StatDescriptor, Sequence[T]]]:
    """Yield each statistic with its values; nothing where none were read."""
    return cut_values(descriptors, values) if values else ()


def _explain_missing(comparison: Comparison, reading: VmReading) -> str:
    """Say why a VM has no row of its own."""
    limits = [source.reason for source in comparison.now.sources if source.source == reading.source and source.reason]
    return reading.counters.problem or "; ".join(limits) or NOTHING_READ


def build_statistics(comparison: Comparison, reading: VmReading) -> list[dict[str, object]] | None:
    """Return a VM's statistics as plain data, in units, histograms with them; None if they were not read.

    What is not known is null. ``counts`` of a histogram are of each bucket alone, the last of which has no bound.
    """
    statistics = reading.counters.statistics
    if statistics is None:
        return None
    table = statistics.table
    whole = Subject(reading)
    sums = (*_cut(table.vm, statistics.vm), *_cut(table.vcpu, statistics.vcpu_sums))
    built = [{**_describe(of_one), **_build_numbers(comparison, whole, of_one, values)} for of_one, values in sums]
    for descriptor, columns in _cut(table.vcpu, statistics.vcpu_columns):
        vcpus = [
            {"vcpu": vcpu.index, **_build_numbers(comparison, Subject(reading, position), descriptor, values)}
            for position, (vcpu, values) in enumerate(zip(reading.vcpus, zip(*columns, strict=True), strict=True))
        ]
        built.append({**_describe(descriptor), "vcpus": vcpus})
    return built


def _describe(descriptor: StatDescriptor) -> dict[str, object]:
    described: dict[str, object] = {
        "statistic": descriptor.key,
        "kind": descriptor.kind,
        "unit": descriptor.unit or None,
    }
    if descriptor.is_histogram:
        described["upper_bounds"] = [_build_number(bound) for bound in descriptor.upper_bounds]
    return described


def _build_numbers(
    comparison: Comparison, subject: Subject, descriptor: StatDescriptor, values: Sequence[int]
) -> Mapping[str, object]:
    if descriptor.is_histogram:
        return {"counts": list(values)}
    value = _build_number(values[0] * descriptor.scale)
    return {"value": value, "per_second": comparison.find_rate(subject, descriptor.key)}


def _build_number(number: Fraction) -> int | float:
    return number.numerator if number.denominator == 1 else float(number)


def render_statistics_json(comparison: Comparison, document: Mapping[str, object]) -> str:
    """Render ``document``, which has the readings of the newest snapshot as ``vms``, with the statistics of each."""
    vms = document["vms"]
    assert isinstance(vms, list)
    with_statistics = [
        {**vm, "statistics": build_statistics(comparison, reading)}
        for vm, reading in zip(vms, comparison.now.readings, strict=True)
    ]
    whole = {**document, "rate_seconds": comparison.seconds or None, "vms": with_statistics}
    return json.dumps(whole, indent=2) + "\n"
