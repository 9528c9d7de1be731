"""What a KVM with the patches of kvm/patches says of a vCPU's notify exits, from one reading to the next; pure.

Such a KVM compares each notify exit with the one before it, so that two readings of its statistics tell what became of
all exits in between, and none has to be traced:

- a **streak** of 0 says that the RIP of the last exit is not known; unknown RIPs are never alike;
- exits at another RIP, or in the guest's guest instead of the guest, are **progress**; so is a streak that has grown by
  less than there were exits, for it has begun anew meanwhile;
- exits that are not *stuck* had other registers than the one before, or another exit in between. More of them than
  there were other exits say that registers changed: a REP instruction goes on, which is progress, too;
- exits of other kinds than notify exits and interrupts of the host may have been anywhere. They prove nothing, neither
  progress nor a stall: the observation is **interrupted**;
- where registers are not read beside (stats fds have none), exits of which none is stuck may be those of a REP with
  an interrupt of the host between any two: they are interrupted, too;
- all else was **at the RIP**, exit after exit.

A reading may fall into the nanoseconds in which KVM counts an exit. Statistics disagree by one then, and agree in the
next reading. So what the numbers alone suggest is believed once two readings say so; a RIP is believed at once. It
takes five readings to believe that one other exit came in between: KVM counts an exit some time before it counts of
which kind it was, under emulation a third of all readings fall into that time, and an interruption makes the
observation begin anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# By how much two readings may disagree because each fell into the middle of an exit.
TORN: Final = 2
# So many readings in a row may show one exit more than there are of all kinds, because each fell into one's middle.
UNDER_WAY: Final = 4
_NOT_KNOWN: Final = (
    "KVM does not know its RIP: registers are protected, it was in an SGX enclave, or the CPU has lost its state"
)


@dataclass(frozen=True, slots=True)
class KernelCounts:
    """The statistics of one vCPU, each by KVM's name without ``notify_window_``, but for the last three.

    ``notify_exits`` is ``notify_window_exits``; ``exits`` and ``irq_exits`` (interrupts of the host) are KVM's own.
    """

    same_rip_exits: int
    stuck_exits: int
    context_invalid_exits: int
    last_rip: int
    last_guest_mode: bool
    streak: int
    notify_exits: int
    exits: int
    irq_exits: int

    @property
    def place(self) -> tuple[int, bool] | None:
        """Where the last notify exit was; None where that is not known."""
        return (self.last_rip, self.last_guest_mode) if self.streak else None


class Kind(StrEnum):
    """What two readings say of the exits between them."""

    NOTHING = "nothing"
    HIDDEN = "hidden"
    LOST = "lost"
    PROGRESS = "progress"
    INTERRUPTED = "interrupted"
    AT_RIP = "at_rip"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of ``exits`` notify exits, of which ``repeats`` were at the RIP of the one before."""

    kind: Kind
    reason: str = ""
    exits: int = 0
    repeats: int = 0


class KernelEvidence:
    """Compares each reading of one vCPU with the one before."""

    def __init__(self) -> None:
        self.interruptions = 0
        """How many readings showed repeats with other exits between them, which only a trace can judge. Counted since
        the vCPU last made progress, or was last watched for as long as a verdict takes."""
        self._before: KernelCounts | None = None
        self._doubts = 0

    @property
    def in_doubt(self) -> bool:
        """Whether the newest reading is not believed yet: the next one will be compared with those before it."""
        return self._doubts > 0

    def observe(self, now: KernelCounts, *, has_registers: bool = True) -> Finding:
        """Take in a reading, and say what it shows; ``has_registers`` where they came with it, to be compared."""
        before = self._before
        if before is None or _began_anew(before, now):
            self._restart(now)
            return _judge_first(now)
        delta = now.notify_exits - before.notify_exits
        repeats = now.same_rip_exits - before.same_rip_exits
        if now.context_invalid_exits > before.context_invalid_exits:
            kind, reason = Kind.LOST, ""
        elif now.notify_exits and now.place is None:
            kind, reason = Kind.HIDDEN, _NOT_KNOWN
        else:
            kind, reason = _compare(before, now, delta, repeats)
            if kind is Kind.AT_RIP and not has_registers and now.stuck_exits == before.stuck_exits:
                kind = Kind.INTERRUPTED
        if self._doubts < _count_doubts(kind, before, now):
            self._doubts += 1
            return Finding(Kind.NOTHING)
        self._restart(now)
        if kind is Kind.INTERRUPTED:
            self.interruptions += repeats > 0
        elif kind not in (Kind.NOTHING, Kind.AT_RIP):
            self.interruptions = 0
        return Finding(kind, reason, delta, max(0, repeats))

    def forget(self) -> None:
        """Say that what happens from now on does not connect with the last reading."""
        self._before, self._doubts, self.interruptions = None, 0, 0

    def _restart(self, now: KernelCounts) -> None:
        self._before, self._doubts = now, 0


def _began_anew(before: KernelCounts, now: KernelCounts) -> bool:
    """Tell whether somebody has set the statistics to 0: each of them can be, by debugfs."""
    cumulative = ("notify_exits", "same_rip_exits", "stuck_exits", "context_invalid_exits", "exits", "irq_exits")
    return any(getattr(now, name) < getattr(before, name) for name in cumulative)


def _judge_first(now: KernelCounts) -> Finding:
    if 0 < now.notify_exits == now.context_invalid_exits:
        return Finding(Kind.LOST)
    return Finding(Kind.HIDDEN, _NOT_KNOWN) if now.notify_exits and now.place is None else Finding(Kind.NOTHING)


def _count_others(before: KernelCounts, now: KernelCounts) -> int:
    """Count the exits that are no notify exits."""
    return now.exits - before.exits - (now.notify_exits - before.notify_exits)


def _count_doubts(kind: Kind, before: KernelCounts, now: KernelCounts) -> int:
    """Say after how many readings that suggest something it is believed of the next."""
    if kind is Kind.PROGRESS and now.place == before.place:
        return 1
    under_way = _count_others(before, now) - (now.irq_exits - before.irq_exits) == 1
    return UNDER_WAY if kind is Kind.INTERRUPTED and under_way else 0


def _compare(before: KernelCounts, now: KernelCounts, delta: int, repeats: int) -> tuple[Kind, str]:
    """Say what became of ``delta`` notify exits; the RIP of the last one is known, if there was one."""
    if before.place is None:
        return Kind.NOTHING, ""
    if now.place != before.place:
        return Kind.PROGRESS, "it took a notify exit at another RIP"
    if min(now.streak - before.streak, repeats) < delta:
        return Kind.PROGRESS, "it took notify exits at another RIP, and is back"
    others = _count_others(before, now)
    moved = delta - (now.stuck_exits - before.stuck_exits)
    if moved > others + TORN:
        return Kind.PROGRESS, "its registers changed from one notify exit to the next"
    if others > now.irq_exits - before.irq_exits:
        return Kind.INTERRUPTED, ""
    return (Kind.AT_RIP if delta else Kind.NOTHING), ""
