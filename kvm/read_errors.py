"""Counts what could not be read, and logs each trouble once and not on every look."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

log = logging.getLogger(__name__)


class ReadErrors:
    """The tally of what was left out, by (source, kind), since start.

    A trouble is logged when a process first has it; then only counted, until the process has ended.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._logged: set[tuple[int, str, str]] = set()

    def teller(self, source: str) -> Callable[[int, str, str], None]:
        """Return a function that records a trouble of this source: (pid, kind, message)."""

        def tell(pid: int, kind: str, message: str) -> None:
            self.record(source, pid, kind, message)

        return tell

    def record(self, source: str, pid: int, kind: str, message: str) -> None:
        """Count one trouble of process ``pid``, and log it if it is new."""
        self._counts[source, kind] += 1
        if (pid, source, kind) not in self._logged:
            self._logged.add((pid, source, kind))
            log.warning("VM left out", extra={"fields": {"pid": pid, "source": source, "kind": kind, "why": message}})

    def forget_others(self, pids: Iterable[int]) -> None:
        """Forget what was logged of processes that are not among these."""
        alive = set(pids)
        self._logged = {entry for entry in self._logged if entry[0] in alive}

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many troubles there were, by (source, kind)."""
        return MappingProxyType(dict(self._counts))
