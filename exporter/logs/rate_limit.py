"""Limits how often a line of one kind is written, and says how many were withheld."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from kvm.log_limit import LogLimit

log = logging.getLogger(__name__)

LINES: Final = 5


class RateLimitedLog:
    """Writes at most LINES lines of a text in a minute; the first one after that says how many were withheld."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = LogLimit(LINES, clock)

    def write(self, level: int, text: str, **fields: object) -> None:
        """Write a line, if there is room for one more of this text."""
        admitted = self._limit.admit(text)
        if admitted is not None:
            log.log(level, text, extra={"fields": {**fields, **admitted}})
