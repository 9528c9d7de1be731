"""A source that is tried again while it does not work, and says of itself whether it does, and if not, why."""

from __future__ import annotations

import logging
from typing import Final

from kvm.counters.source import CounterSource
from kvm.errors import SourceUnavailable
from kvm.model import SourceReport

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 300.0
# The best source is missed most, and its failing costs nobody a line in the kernel log.
BEST_RETRY_SECONDS: Final = 30.0


class RetriedSource:
    """A source with what is known of it: whether it is open, and if not, why and since when."""

    def __init__(self, source: CounterSource) -> None:
        self.source = source
        self.open = False
        self._failure: SourceUnavailable | None = None
        self._tried_at = float("-inf")

    def ensure_open(self, now: float) -> bool:
        """Open the source if it is closed and due to be tried; tells whether it is open."""
        retry_seconds = BEST_RETRY_SECONDS if self.source.finds_vms else RETRY_SECONDS
        if not self.open and now - self._tried_at >= retry_seconds:
            self._tried_at = now
            try:
                self.source.open()
            except SourceUnavailable as err:
                if str(err) != str(self._failure):
                    log.info("source does not work", extra={"fields": self._describe(err)})
                self._failure = err
            else:
                self.open, self._failure = True, None
                log.info("source works", extra={"fields": {"source": self.source.name}})
        return self.open

    def start_anew(self) -> None:
        """Take nothing for known any more, and let the source be tried at the next occasion."""
        if self.open:
            self.source.close()
            self.open = False
        self._tried_at = float("-inf")

    @property
    def is_up(self) -> bool:
        """Whether it works: it is open, and has been seen to read something."""
        return self.open and not self.source.doubt

    def fail(self, err: SourceUnavailable) -> None:
        """Close the source, because it has stopped working."""
        self.source.close()
        self.open, self._failure = False, err
        log.warning("source has stopped working", extra={"fields": self._describe(err)})

    def _describe(self, err: SourceUnavailable) -> dict[str, str]:
        return {"source": self.source.name, "reason": err.reason, "remedy": err.remedy}

    def report(self) -> SourceReport:
        """Say whether the source works, and if not, why and what to do."""
        if self._failure is None and self.open and self.source.doubt:
            return SourceReport(self.source.name, up=False, reason=self.source.doubt)
        if self._failure is None:
            return SourceReport(self.source.name, up=self.open, reason=self.source.limits if self.open else "")
        return SourceReport(self.source.name, up=False, reason=self._failure.reason, remedy=self._failure.remedy)
