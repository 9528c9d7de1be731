"""Waits in tests for what no event tells of: the one place that asks again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# Long enough for a loaded machine; nothing waits this long unless something is broken.
PATIENCE_SECONDS: Final = 30.0


def wait_until(
    holds: Callable[[], object],
    what: str | Callable[[], str] = "what the test waits for",
    seconds: float = PATIENCE_SECONDS,
    *,
    pause_seconds: float = 0.01,
) -> float:
    """Return, when it holds, after how many seconds; raises TimeoutError, which says what has not come.

    ``pause_seconds`` is longer where asking costs those who are to make it hold.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause_seconds)
    return time.monotonic() - began
