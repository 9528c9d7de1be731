"""Lines of many VMs come metric by metric."""

from __future__ import annotations

from exporter.prometheus.grouped_lines import group_lines
from exporter.prometheus.metrics import Metric, MetricType

FIRST, SECOND = (Metric(f"kvm_{name}", MetricType.GAUGE, name) for name in "ab")


def test_the_lines_of_a_metric_stand_together() -> None:
    vms = [[(FIRST, b"a 1\n")], [(SECOND, b"b 1\nb 2\n"), (FIRST, b"a 2\n")], []]
    found = {family.metric: family.chunks for family in group_lines(vms)}
    assert found == {FIRST: [b"a 1\n", b"a 2\n"], SECOND: [b"b 1\nb 2\n"]}
