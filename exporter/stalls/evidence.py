"""What speaks for a stall of one vCPU: how long, and for how many exits, it was watched at one RIP; pure.

Exits that are no notify exits may come between two records, at other RIPs: then the guest runs. So time and exits count
only while the progress event (any exit at another RIP) was armed and silent: within an ``ObservationWindow``. Where
exits are so slow that one window is not enough, windows add up, but only long ones: else a guest that leaves its RIP
and comes back, again and again, would be stuck in the sum of many short sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from exporter.stalls.verdicts import Verdict

# A window adds to others if it has lasted for so long.
LONG_SECONDS: Final = 2.0
# /proc counts CPU time in ticks of 10 ms: over this long they are 2 % of a CPU.
CPU_SAMPLE_SECONDS: Final = 0.5
IDLE_PERCENT: Final = 5.0


@dataclass(slots=True)
class RecordRun:
    """Trace records in a row at one RIP: where, since when, and how many.

    ``registers`` are those that were read there first, and when. A run whose RIP is None has not begun.
    """

    rip: int | None = None
    first_seconds: float = 0.0
    length: int = 0
    registers: tuple[float, Mapping[str, int]] | None = None


class CpuMeter:
    """How much of a CPU a vCPU's thread uses; ``percent`` is None until two samples are far enough apart."""

    def __init__(self) -> None:
        self.percent: float | None = None
        self._sample: tuple[float, float] | None = None

    def observe(self, seconds: float, cpu_seconds: float) -> None:
        """Take in the CPU time that the thread has used, user and system, since it began."""
        before = self._sample
        if before is None or cpu_seconds < before[1]:
            self._sample, self.percent = (seconds, cpu_seconds), None
        elif seconds - before[0] >= CPU_SAMPLE_SECONDS:
            self._sample = (seconds, cpu_seconds)
            self.percent = 100.0 * (cpu_seconds - before[1]) / (seconds - before[0])

    @property
    def is_idle(self) -> bool:
        """Whether the thread is known to use next to nothing."""
        return self.percent is not None and self.percent < IDLE_PERCENT


def explain_stillness(cpu: CpuMeter) -> str:
    """Say what it means that the counter of a stuck vCPU stands still."""
    if cpu.percent is None:
        return "its counter stands still: it may be paused"
    uses = f"its thread uses {cpu.percent:.0f} % of a CPU"
    if cpu.is_idle:
        return f"its counter stands still and {uses}: it is paused or throttled"
    return f"its counter stands still but {uses}: it is not paused"


@dataclass(slots=True)
class ObservationWindow:
    """A time in which the progress event was armed for one RIP, and silent; ``started`` is when it was armed."""

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
        """Whether the progress event was silent for so long that the window adds to others."""
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

    def take_exits(self, after: float, until: float, exits: int) -> None:
        """Take in that so many exits, all at the RIP and in a row, came after one moment and before another.

        So the first came at ``until`` at the latest, and the last not before ``after``: in between it was at the RIP.
        """
        if self.first_seconds is None:
            self.first_seconds = self.last_seconds = until
        self.last_seconds = max(self.last_seconds, after)
        self._exits += exits

    def interrupt(self) -> None:
        """Take in that what comes next does not connect with what was seen: keep that, and begin afresh."""
        self._kept = (self.exits, self.seconds)
        self.first_seconds = self._base = self._pending = None
        self._exits = self._records = 0


@dataclass(slots=True)
class Suspicion:
    """A RIP at which two records in a row were seen, and what speaks for a stall there.

    ``exits`` and ``seconds`` are the sums of the windows that have ended. ``alike_since`` and ``alike_until`` bound the
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

    def sum(self, window: ObservationWindow | None) -> tuple[int, float]:
        """Return for how many exits and seconds it was watched at the RIP, a window under way included."""
        return (
            (self.exits, self.seconds) if window is None else (self.exits + window.exits, self.seconds + window.seconds)
        )

    def add(self, window: ObservationWindow | None) -> None:
        """Keep what a window that has ended has shown."""
        self.exits, self.seconds = self.sum(window)

    def complete(self, verdict: Verdict, window: ObservationWindow | None) -> Verdict:
        """Return a verdict with the evidence for it added."""
        exits, _ = self.sum(window)
        return replace(
            verdict,
            rip=self.rip,
            streak=self.streak,
            exits=exits,
            stuck_since_seconds=self.first_seconds,
            registers_alike=self.registers_alike,
            nested=self.nested,
            context_invalid=self.context_invalid,
            idt_vectoring=self.idt_vectoring,
        )

    def take_registers(self, began: float, ended: float, registers: Mapping[str, int]) -> None:
        """Take in registers that are alike, read between ``began`` and ``ended``."""
        if self.registers is None:
            self.registers, self.alike_since = registers, ended
        self.alike_until = max(self.alike_since, began)

    def find_ripe(self, window: ObservationWindow | None, rule_seconds: float) -> float | None:
        """Return when it will have been watched for long enough if nothing speaks against it; None if not watched."""
        if window is None or window.first_seconds is None:
            return None
        ripe = window.last_seconds + rule_seconds - self.seconds - window.seconds
        return ripe if self.registers is None else max(ripe, self.alike_since + rule_seconds)
