"""What speaks for a stall of one vCPU: how long, and for how many exits, it was watched at one RIP; pure.

Exits that are no notify exits may come between two records, at other RIPs: then the guest runs. So time and exits count
only while event B, any exit at another RIP, was watched for and silent: within an
``ObservationWindow``. Where exits are so slow that one window is not enough, windows add up, but only long ones: else a
guest that leaves its RIP and comes back, again and again, would be stuck in the sum of many short looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# A span adds to others if it has lasted for so long.
LONG_SECONDS: Final = 2.0


@dataclass(slots=True)
class ObservationWindow:
    """A time in which event B was watched for one RIP, and silent; ``started`` is when that had begun."""

    started: float
    first_seconds: float | None = None
    last_seconds: float = 0.0
    _kept: tuple[int, float] = (0, 0.0)
    _exits: int = 0
    _records: int = 0
    _base: int | None = None
    _pending: tuple[float, int] | None = None

    @property
    def exits(self) -> int:
        """For how many notify exits the vCPU was watched at the RIP."""
        return self._kept[0] + self._exits

    @property
    def seconds(self) -> float:
        """How long the vCPU was watched at the RIP: from the first record to the last, without interruptions."""
        return self._kept[1] + (0.0 if self.first_seconds is None else self.last_seconds - self.first_seconds)

    @property
    def is_long(self) -> bool:
        """Whether event B was silent for so long that the span adds to others."""
        return self.last_seconds - self.started >= LONG_SECONDS

    def take_record(self, seconds: float) -> None:
        """Take in a record at the RIP: the readings before it counted exits that were all there."""
        if seconds < self.started:
            return
        if self.first_seconds is None:
            self.first_seconds = seconds
        self.last_seconds = max(self.last_seconds, seconds)
        self._records += 1
        self._exits = max(self._exits, self._records)
        if self._pending and self._base is not None and seconds >= self._pending[0]:
            self._exits = max(self._exits, self._pending[1] - self._base)

    def take_count(self, began: float, ended: float, notify_exits: int) -> None:
        """Take in the counter, read between ``began`` and ``ended``; what it says holds after the next record."""
        if self.first_seconds is None:
            return
        if self._base is not None:
            self._pending = (ended, notify_exits)
        elif began >= self.first_seconds:
            self._base = notify_exits

    def interrupt(self) -> None:
        """Take in that what comes next does not connect with what was seen: keep that, and begin afresh."""
        self._kept = (self.exits, self.seconds)
        self.first_seconds = self._base = self._pending = None
        self._exits = self._records = 0


@dataclass(slots=True)
class Suspicion:
    """A RIP at which two records in a row were seen, and what speaks for a stall there.

    ``exits`` and ``seconds`` are the sums of the spans that have ended. ``alike_since`` and ``alike_until`` bound the
    time for which the registers are known to have stayed alike. ``enough_seconds`` is when exits were known to suffice.
    """

    rip: int
    first_seconds: float
    registers: Mapping[str, int] | None = None
    alike_since: float = 0.0
    alike_until: float = 0.0
    exits: int = 0
    seconds: float = 0.0
    streak: int = 2
    enough_seconds: float | None = None
    stalled: bool = False
    nested: bool | None = None
    context_invalid: bool = False
    idt_vectoring: int = 0

    @property
    def registers_alike(self) -> bool | None:
        """Whether the registers were read twice and were alike; None where they were not read."""
        return None if self.registers is None else self.alike_until > self.alike_since

    def sum(self, span: ObservationWindow | None) -> tuple[int, float]:
        """Return for how many exits and seconds it was watched at the RIP, a span under way included."""
        return (self.exits, self.seconds) if span is None else (self.exits + span.exits, self.seconds + span.seconds)

    def add(self, span: ObservationWindow | None) -> None:
        """Keep what a span that has ended has shown."""
        self.exits, self.seconds = self.sum(span)

    def take_registers(self, began: float, ended: float, registers: Mapping[str, int]) -> None:
        """Take in registers that are alike, read between ``began`` and ``ended``."""
        if self.registers is None:
            self.registers, self.alike_since = registers, ended
        self.alike_until = max(self.alike_since, began)

    def find_ripe(self, span: ObservationWindow | None, rule_seconds: float) -> float | None:
        """Return when it will have been watched for long enough if nothing speaks against it; None if not watched."""
        if span is None or span.first_seconds is None:
            return None
        ripe = span.last_seconds + rule_seconds - self.seconds - span.seconds
        return ripe if self.registers is None else max(ripe, self.alike_since + rule_seconds)
