"""What docs/fleet.md says of the number of series is what a real kernel's statistics give."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from exporter.prometheus.series_warning import count_series
from exporter.prometheus.stat_series import StatSeries
from kvm.model import Vcpu, VmReading
from kvm.statistic_plan import plan_statistics
from kvm.statistics import StatScope, StatSelection, VmStatistics
from tests.bench.bench_stats import TEN
from tests.documents import DOCS, find_table
from tests.known_statistics import read_captured
from tests.snapshots import make_reading

VMS, VCPUS = 50, 8
HEADER = ("flags besides `--collector.stats`", "series more", "50 VMs of 8 vCPUs")
ROWS = {row[0]: row[1:] for row in find_table(DOCS / "fleet.md", *HEADER)}


def make_readings(level: StatScope, pattern: str, exclude: str) -> list[tuple[str, VmReading]]:
    """VMs that have all of a real kernel's statistics that are chosen, each of them 1."""
    selection = StatSelection(level, lambda key: bool(re.search(pattern, key)) and not re.search(exclude, key))
    plan = plan_statistics(selection, read_captured(StatScope.VM), read_captured(StatScope.VCPU), 4096)
    words = (1,) * len(plan.vcpu_words)
    columns = tuple((1,) * VCPUS for _ in words)
    of_vcpus = (words, None) if level is StatScope.VM else (None, columns)
    statistics = VmStatistics(plan.table, (1,) * len(plan.vm_words) or None, *of_vcpus)
    vcpus = tuple(Vcpu(index, index, None) for index in range(VCPUS))
    reading = replace(make_reading(), vcpus=vcpus, counters=make_reading().counters._replace(statistics=statistics))
    return [(f"vm-{number}", reading) for number in range(VMS)]


@pytest.mark.parametrize(
    ("flags", "level", "pattern", "exclude"),
    [
        ("none", StatScope.VM, "", "^$"),
        ("`--collector.stats.exclude=_hist$`", StatScope.VM, "", "_hist$"),
        ("`--collector.stats.include=` ten names", StatScope.VM, f"^vcpu/({'|'.join(TEN)})$", "^$"),
        ("`--collector.stats.level=vcpu`", StatScope.VCPU, "", "^$"),
        ("both `level=vcpu` and `exclude=_hist$`", StatScope.VCPU, "", "_hist$"),
    ],
)
def test_the_table_of_series(flags: str, level: StatScope, pattern: str, exclude: str) -> None:
    formula, total = ROWS[flags]
    series = count_series(StatSeries().collect(make_readings(level, pattern, exclude)))
    assert series == int(total.replace(",", ""))
    parts = {name: int(number) for number, name in re.findall(r"(\d+) ([VC])", formula)}
    assert series == parts.get("V", 0) * VMS + parts.get("C", 0) * VMS * VCPUS
