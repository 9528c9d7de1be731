"""The ``rate_limit`` of ``--web.config.file``: a token bucket, as exporter-toolkit's."""

from __future__ import annotations

from collections.abc import Callable

from exporter.web.web_config import RateLimit


class RequestLimit:
    """Admits ``burst`` requests at once and one more each ``interval_seconds``; ``clock`` is CLOCK_MONOTONIC."""

    def __init__(self, limit: RateLimit, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._tokens, self._at = float(limit.burst), clock()

    def admit(self) -> bool:
        """Tell whether one more request may pass, and count it if so."""
        now = self._clock()
        self._tokens = min(self._limit.burst, self._tokens + (now - self._at) / self._limit.interval_seconds)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
