"""Limits how many lines of a kind are written in a minute, and counts those that were withheld; no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

WINDOW_SECONDS: Final = 60.0


@dataclass(slots=True)
class _Kind:
    """Of one kind of line: since when, how many were written, and how many more there would have been."""

    since: float
    written: int = 0
    withheld: int = 0


class LogLimit:
    """Lets at most ``lines`` of a kind through in WINDOW_SECONDS; ``clock`` gives seconds that only grow."""

    def __init__(self, lines: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines, self._clock = lines, clock
        self._kinds: dict[str, _Kind] = {}

    def admit(self, name: str) -> Mapping[str, int] | None:
        """Return fields to add to a line of this kind, None where it is withheld.

        The first line after WINDOW_SECONDS says how many were withheld before it.
        """
        now = self._clock()
        kind = self._kinds.setdefault(name, _Kind(now))
        fields = {}
        if now - kind.since >= WINDOW_SECONDS:
            if kind.withheld:
                fields["withheld"] = kind.withheld
            kind.since, kind.written, kind.withheld = now, 0, 0
        if kind.written >= self._lines:
            kind.withheld += 1
            return None
        kind.written += 1
        return fields
