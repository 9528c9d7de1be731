"""The token bucket."""

from __future__ import annotations

from exporter.web.request_limit import RequestLimit
from exporter.web.web_config import RateLimit


def test_a_burst_then_one_each_interval() -> None:
    now = 100.0
    limit = RequestLimit(RateLimit(0.5, 3), lambda: now)
    assert [limit.admit() for _ in range(5)] == [True, True, True, False, False]
    now += 0.5
    assert [limit.admit() for _ in range(2)] == [True, False]
    now += 0.25
    assert not limit.admit()
    now += 0.25
    assert limit.admit()
    now += 1000.0
    assert [limit.admit() for _ in range(4)] == [True, True, True, False]
