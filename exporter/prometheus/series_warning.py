"""Says it once where one agent has more series than a Prometheus is glad of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from exporter.prometheus.exposition import Family

log = logging.getLogger(__name__)

MANY_SERIES: Final = 50_000
# The shortest lines have more bytes: whoever has less need not be counted.
LINE_BYTES: Final = 20
GROWTH: Final = 0.01


def count_series(families: Iterable[Family]) -> int:
    """Count the sample lines of these families."""
    return sum(chunk.count(b"\n") for family in families for chunk in family.chunks)


class SeriesWarning:
    """Warns once of too many series."""

    def __init__(self) -> None:
        self._has_warned = False
        self._counted = 0

    def look(self, families: Sequence[Family]) -> None:
        """Count the series of a scrape where there may be more than before, until there was something to say."""
        length = sum(len(chunk) for family in families for chunk in family.chunks)
        # Numbers grow by a digit now and then; to count 2 MB takes 0.5 ms.
        is_counted = abs(length - self._counted) < self._counted * GROWTH
        if self._has_warned or is_counted or length < MANY_SERIES * LINE_BYTES:
            return
        self._counted = length
        series = count_series(families)
        if series > MANY_SERIES:
            self._has_warned = True
            fields = {"series": series, "remedy": "--collector.stats.include, or --collector.stats.level=vm"}
            log.warning("more series than are good for a Prometheus", extra={"fields": fields})
