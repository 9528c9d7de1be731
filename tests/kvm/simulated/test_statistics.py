"""The simulated host's statistics: chosen and typed as a real kernel's, and growing with time."""

from __future__ import annotations

import pytest

from kvm.simulated.host import SimulatedHost
from kvm.statistics import StatScope, StatSelection, VmStatistics, cut_values
from tests.known_statistics import plan_captured


def read(seconds: float, level: StatScope, wanted: str = "") -> list[VmStatistics | None]:
    clock = iter([0.0, seconds])
    selection = StatSelection(level, lambda key: wanted in key)
    host = SimulatedHost(lambda: next(clock), lambda: 1.8e9, selection=selection)
    return [reading.counters.statistics for reading in host.read().readings]


@pytest.mark.parametrize("level", StatScope)
def test_they_are_typed_as_those_of_a_real_kernel(level: StatScope) -> None:
    real = plan_captured(level)
    for statistics in read(1.0, level):
        assert statistics is not None
        assert set(statistics.table.vm) <= set(real.vm)
        assert set(statistics.table.vcpu) <= set(real.vcpu)
        assert statistics.table.left_out == ()


def test_sums_are_those_of_the_vcpus() -> None:
    for summed, split in zip(read(60.0, StatScope.VM), read(60.0, StatScope.VCPU), strict=True):
        assert summed is not None
        assert split is not None
        assert summed.vm == split.vm
        if split.vcpu_columns is None:
            continue  # of one VM only sums can be read
        by_name = {one.key: columns for one, columns in cut_values(split.table.vcpu, split.vcpu_columns)}
        for one, values in cut_values(summed.table.vcpu, summed.vcpu_sums or ()):
            assert values == tuple(sum(column) for column in by_name[one.key]), one.name


def test_what_is_cumulative_grows() -> None:
    for before, after in zip(read(1.0, StatScope.VM), read(61.0, StatScope.VM), strict=True):
        assert before is not None
        assert after is not None
        assert all(a <= b for a, b in zip(before.vcpu_sums or (), after.vcpu_sums or (), strict=True))
        assert before.vcpu_sums != after.vcpu_sums


def test_only_what_is_wanted_is_there() -> None:
    (statistics, *_) = read(1.0, StatScope.VM, "irq")
    assert statistics is not None
    assert [one.key for one in statistics.table.vcpu] == ["vcpu/request_irq_exits", "vcpu/irq_injections"]
    assert statistics.vm is None
    clock = iter([0.0, 1.0])
    assert all(r.counters.statistics is None for r in SimulatedHost(lambda: next(clock), lambda: 0.0).read().readings)
