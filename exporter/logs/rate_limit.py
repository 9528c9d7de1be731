"""Limits how often a line of one kind is written, and says how many were withheld."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

LINES: Final = 5
WINDOW_SECONDS: Final = 60.0


@dataclass(slots=True)
class _Kind:
    """Of one kind of line: since when, how many were written, and how many more there would have been."""

    since: float
    written: int = 0
    withheld: int = 0


class RateLimitedLog:
    """Writes at most LINES lines of a kind in WINDOW_SECONDS; the first one after that says how many were withheld."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def write(self, level: int, text: str, **fields: object) -> None:
        """Write a line, if there is room for one more of this text."""
        now = self._clock()
        kind = self._kinds.setdefault(text, _Kind(now))
        if now - kind.since >= WINDOW_SECONDS:
            if kind.withheld:
                fields["withheld"] = kind.withheld
            kind.since, kind.written, kind.withheld = now, 0, 0
        if kind.written >= LINES:
            kind.withheld += 1
            return
        kind.written += 1
        log.log(level, text, extra={"fields": fields})
