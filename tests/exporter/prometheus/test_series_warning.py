"""Too many series are told of once."""

from __future__ import annotations

import pytest

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Family, render_sample
from exporter.prometheus.series_warning import LINE_BYTES, MANY_SERIES, SeriesWarning, count_series
from tests.snapshots import make_reading


def make_family(series: int) -> Family:
    line = render_sample(metrics.VM_VCPUS, (make_reading().vm.id,), 2)
    assert len(line) > LINE_BYTES
    return Family(metrics.VM_VCPUS, [line * (series // 2), line * (series - series // 2)])


def test_more_than_many_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    warning = SeriesWarning()
    warning.look([make_family(MANY_SERIES)])
    assert not caplog.records
    more = MANY_SERIES // 50
    for _ in range(2):
        warning.look([make_family(MANY_SERIES), make_family(more)])
    (record,) = caplog.records
    assert record.fields["series"] == MANY_SERIES + more  # type: ignore[attr-defined]
    assert "include" in record.fields["remedy"]  # type: ignore[attr-defined]


def test_series_are_lines() -> None:
    assert count_series([make_family(7), make_family(1), Family(metrics.VM_VCPUS)]) == 8
