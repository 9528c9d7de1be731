"""What a QEMU itself reads of KVM's statistics, by QMP: a second reader, and which series follow from that.

QEMU (7.1 to 10.0 at least) gives the buckets of a histogram from the last to the first: it prepends each to its list
(add_kvmstat_entry in accel/kvm/kvm-all.c). ``tests/live/test_statistics.py`` holds the order to KVM's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

Ask = Callable[..., Any]
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
TYPES = {"cumulative", "instant", "peak", "linear-histogram", "log2-histogram"}


def read_expected_series(ask: Ask) -> Series:
    """Return the series of a QEMU whose guest stands still, without the label ``vm``; ``ask`` runs a QMP command."""
    schemas = {
        (schema["target"], stat["name"]): stat
        for schema in ask("query-stats-schemas", provider="kvm")
        for stat in schema["stats"]
    }
    assert {target for target, _ in schemas} == {"vm", "vcpu"}
    indexes = {cpu["qom-path"]: str(cpu["cpu-index"]) for cpu in ask("query-cpus-fast")}
    series: Series = {}
    for target in ("vm", "vcpu"):
        for answer in ask("query-stats", target=target, providers=[{"provider": "kvm"}]):
            labels = {"vcpu": indexes[answer["qom-path"]]} if target == "vcpu" else {}
            for stat in answer["stats"]:
                for sample, more, value in name_samples(target, schemas[target, stat["name"]], stat["value"]):
                    series[sample, frozenset({**labels, **more}.items())] = value
    return series


def name_samples(
    target: str, schema: dict[str, Any], value: int | bool | list[int]
) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield the samples that a statistic has to be, in base units."""
    kind, unit, exponent = schema["type"], schema.get("unit", ""), schema["exponent"]
    assert kind in TYPES
    base: int = schema.get("base", 10)
    scale = float(base) ** exponent
    family = f"kvm_{target}_stat_{schema['name']}" + ("" if unit in ("", "boolean") else f"_{unit}")
    if isinstance(value, list):
        width: int = schema.get("bucket-size", 0)
        ends = [number * width if kind == "linear-histogram" else 2 ** (number - 1) for number in range(1, len(value))]
        bounds = [*(repr(float(f"{end * scale:.12g}")) for end in ends), "+Inf"]
        for bound, count in zip(bounds, accumulate(order_buckets(value)), strict=True):
            yield f"{family}_bucket", {"le": bound}, count
    elif kind == "cumulative":
        yield f"{family}_total", {}, value * scale
    else:
        yield family, {}, value * scale


def order_buckets(answer: list[int]) -> list[int]:
    """Return a histogram's buckets, that of the smallest values first."""
    return answer[::-1]


def keep_statistics(text: str, vm: str, parse: Callable[[str], Any]) -> Series:
    """Return the series of one VM's statistics in a text, without the label ``vm``."""
    found: Series = {}
    for family in parse(text):
        for sample in family.samples:
            if sample.labels.get("vm") == vm and "_stat_" in sample.name:
                labels = {name: value for name, value in sample.labels.items() if name != "vm"}
                found[sample.name, frozenset(labels.items())] = sample.value
    return found
