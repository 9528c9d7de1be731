"""Typed statistics: what is derived from a descriptor, and whose values are whose."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kvm.statistics import StatDescriptor, StatKind, StatScope, StatUnit, count_values, cut_values

VCPU = StatScope.VCPU


def test_a_scale_is_the_base_to_the_exponent() -> None:
    assert StatDescriptor(VCPU, "ns", StatKind.CUMULATIVE, StatUnit.SECONDS, 10, -9).scale == Fraction(1, 10**9)
    assert StatDescriptor(VCPU, "mib", StatKind.INSTANT, StatUnit.BYTES, 2, 20).scale == 1 << 20
    assert StatDescriptor(VCPU, "plain", StatKind.INSTANT).scale == 1


def test_a_logarithmic_histogram_counts_zeros_and_then_what_is_below_powers_of_two() -> None:
    histogram = StatDescriptor(VCPU, "h", StatKind.LOG_HISTOGRAM, StatUnit.SECONDS, 10, -9, size=5)
    assert histogram.upper_bounds == tuple(Fraction(bound, 10**9) for bound in (1, 2, 4, 8))


def test_a_linear_histogram_has_buckets_of_one_width() -> None:
    histogram = StatDescriptor(VCPU, "h", StatKind.LINEAR_HISTOGRAM, StatUnit.BYTES, 2, 10, size=4, bucket_size=3)
    assert histogram.upper_bounds == tuple(Fraction(bound << 10) for bound in (3, 6, 9))


@pytest.mark.parametrize("kind", StatKind)
def test_what_only_grows_can_be_summed(kind: StatKind) -> None:
    assert StatDescriptor(VCPU, "x", kind).is_cumulative is (kind not in (StatKind.INSTANT, StatKind.PEAK))


def test_values_are_cut_by_size() -> None:
    descriptors = (StatDescriptor(VCPU, "a", StatKind.PEAK), StatDescriptor(VCPU, "b", StatKind.LOG_HISTOGRAM, size=2))
    assert count_values(descriptors) == 3
    assert [(descriptor.key, values) for descriptor, values in cut_values(descriptors, (7, 8, 9))] == [
        ("vcpu/a", (7,)),
        ("vcpu/b", (8, 9)),
    ]
