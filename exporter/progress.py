"""Who makes no forward progress: records, registers and counter readings of one vCPU in, verdicts out; pure.

A notify exit says that a guest opened no event window for a while. One is no proof of anything. A vCPU is stuck if it
takes them at one RIP, exit after exit, and shows no other sign of life. What counts, and what does not:

- **The RIP** is taken from trace records only. Where KVM hides it, nothing can be said, and equal unknowns are no pair.
- **A pair** are two records in a row at one RIP. Records that were lost, or that come late, prove nothing: they make no
  pair. A record at another RIP always proves progress, whenever it comes, unless it is older than the suspicion.
- **Watched.** Exits that are no notify exits may come between two records, at other RIPs: then the guest runs. So time
  and exits count towards a stall only while event B, any exit at another RIP, was watched for and silent: from one
  record at the RIP to a later one, within one span. What happens between two looks is not seen, and counts nothing.
- **Exits** are those of KVM's own counter, between two readings within a span, with a record at the RIP after the
  second: so they were all at that RIP. Records of a span count as well, where they are more.
- **Registers** other than RIP and RSP that change are progress: a REP instruction moves RCX while its RIP stays. Where
  they can be read they must have been alike for as long as the stall takes; where not, the verdict says so.
- **Silence** proves nothing. A stuck vCPU whose counter stands still may be paused: it is ``unknown``.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from exporter.verdicts import StallRule, State, Verdict
from kvm import abi
from kvm.model import NotifyExit

# Without movement of the counter for so long a vCPU is quiet again.
QUIET_SECONDS: Final = 60.0
# A stuck vCPU whose counter stands still for so long, and for three of its intervals, is not known to be stuck.
STILL_SECONDS: Final = 3.0
STILL_INTERVALS: Final = 3
# So that somebody sees it: a vCPU that goes on after a stall may take a last notify exit or two.
RECOVERED_SECONDS: Final = 15.0
# RIP is what is judged anyway, and on VMX neither is current in memory (VMX_REGS_LAZY_LOAD_SET).
NOT_COMPARED: Final = frozenset({"rip", "rsp"})

_NS: Final = 1_000_000_000


@dataclass(slots=True)
class _Span:
    """A time without a break in which event B was watched for one RIP; ``started`` is when that had begun."""

    started: float
    first_seconds: float | None = None
    last_seconds: float = 0.0
    base: int | None = None
    pending: tuple[float, int] | None = None
    exits: int = 0
    records: int = 0

    @property
    def seconds(self) -> float:
        return 0.0 if self.first_seconds is None else self.last_seconds - self.first_seconds


@dataclass(slots=True)
class _Suspicion:
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


class VcpuProgress:
    """Judges one vCPU; each ``observe`` returns the verdicts of the states that the vCPU has entered by it."""

    def __init__(self, rule: StallRule, now: float) -> None:
        self.state = State.QUIET
        self.traced_exits = 0
        self.same_rip_exits = 0
        self.moved_seconds: float | None = None
        """When a notify exit was last known to have happened."""
        self.interval_seconds: float | None = None
        """How long it takes, as far as is known, from one notify exit to the next."""
        self.shortest_seconds: float | None = None
        """The shortest time seen between two records in a row at one RIP."""
        self.proofs = 0
        """How often progress has been proved, so that a look can tell whether it was in its time."""
        self.rip_hidden = False
        self._rule = rule
        self._since = now
        self._why = ""
        self._episode = 0
        self._counter: tuple[float, int] | None = None
        self._last_record_seconds = float("-inf")
        self._rip: int | None = None
        self._rip_seconds = 0.0
        self._streak = 0
        self._registers: tuple[float, Mapping[str, int]] | None = None
        self._nested: bool | None = None
        self._suspicion: _Suspicion | None = None
        self._ended: _Suspicion | None = None
        self._span: _Span | None = None
        self._changes: list[Verdict] = []

    @property
    def rip(self) -> int | None:
        """The RIP at which the vCPU is suspected to be stuck, or was last seen; None where there is none."""
        suspicion = self._suspicion
        return suspicion.rip if suspicion else self._rip

    @property
    def notify_exits(self) -> int | None:
        """The counter as it was last read."""
        return self._counter[1] if self._counter else None

    @property
    def suspected(self) -> bool:
        """Whether there is a RIP at which the vCPU is, or was last known to be, stuck."""
        return self._suspicion is not None

    @property
    def watching(self) -> bool:
        """Whether a span is under way: proof of progress ends it."""
        return self._span is not None

    @property
    def ripe_seconds(self) -> float | None:
        """When the vCPU will have been suspect for long enough, if nothing speaks against it; None if it is not."""
        suspicion, span = self._suspicion, self._span
        if suspicion is None or suspicion.stalled or span is None or span.first_seconds is None:
            return None
        ripe = span.first_seconds + self._rule.seconds - suspicion.seconds
        return ripe if suspicion.registers is None else max(ripe, suspicion.alike_since + self._rule.seconds)

    @property
    def verdict(self) -> Verdict:
        """What is known now; may be asked from another thread."""
        found = self._suspicion or self._ended
        if found is None:
            return Verdict(self.state, self._since, self._why, nested=self._nested)
        exits, _ = self._sum(found)
        return Verdict(
            state=self.state,
            since_seconds=self._since,
            why=self._why,
            rip=found.rip,
            streak=found.streak,
            exits=exits,
            stuck_since_seconds=found.first_seconds,
            registers_alike=None if found.registers is None else found.alike_until > found.alike_since,
            nested=found.nested,
            context_invalid=found.context_invalid,
            idt_vectoring=found.idt_vectoring,
            episode=self._episode,
        )

    def observe_trigger(self, now: float) -> Sequence[Verdict]:
        """Take in that a notify exit has just happened."""
        self._move(now)
        return self._take_changes()

    def observe_counter(self, began: float, ended: float, notify_exits: int) -> Sequence[Verdict]:
        """Take in the counter, read between ``began`` and ``ended``."""
        before, self._counter = self._counter, (ended, notify_exits)
        if before is None:
            self._count(began, ended, notify_exits, was_reset=False)
            return ()
        was_reset = notify_exits < before[1]
        moved = notify_exits if was_reset else notify_exits - before[1]
        if moved:
            self.interval_seconds = max(0.0, ended - before[0]) / moved
            self._move(ended)
        else:
            self._rest(ended)
        self._count(began, ended, notify_exits, was_reset)
        return self._take_changes()

    def observe_records(
        self, now: float, records: Iterable[NotifyExit], *, lost: int = 0, other_rip: bool = False
    ) -> Sequence[Verdict]:
        """Take in what a trace has given: records, how many were lost, whether event B has fired."""
        for record in sorted(records, key=lambda record: record.time_ns):
            self._take_record(record, trusted=not lost)
        if lost:
            self._rip, self._streak = None, 0
            self._break_span()
        if other_rip:
            self._prove(now, "it left the guest at another RIP")
        return self._take_changes()

    def observe_registers(
        self, began: float, ended: float, registers: Mapping[str, int], nested: bool | None
    ) -> Sequence[Verdict]:
        """Take in the registers, those that are current, read between ``began`` and ``ended``."""
        self._nested = nested
        suspicion = self._suspicion
        if began < (suspicion.first_seconds if suspicion else self._rip_seconds):
            return ()  # from before it came here
        compared = {name: value for name, value in registers.items() if name not in NOT_COMPARED}
        before = suspicion.registers if suspicion else self._registers[1] if self._registers else None
        changed = before is not None and [name for name in before if compared.get(name, before[name]) != before[name]]
        if changed:
            self._prove(ended, f"its registers changed: {' '.join(changed)}")
        elif suspicion:
            suspicion.nested = nested
            if suspicion.registers is None:
                suspicion.registers, suspicion.alike_since = compared, ended
            suspicion.alike_until = max(suspicion.alike_since, began)
            self._judge(ended)
        elif self._rip is not None and self._registers is None:
            self._registers = (ended, compared)
        return self._take_changes()

    def start_span(self, now: float) -> None:
        """Say that from now on event B is watched for, at the vCPU's RIP."""
        self.end_span()
        self._span = _Span(now)

    def end_span(self) -> None:
        """Say that event B is no longer watched for."""
        self._break_span()
        self._span = None

    def _take_record(self, record: NotifyExit, trusted: bool) -> None:
        seconds = record.time_ns / _NS
        self.traced_exits += 1
        self.rip_hidden = record.rip is None
        if record.rip is None:
            self._rip, self._streak, self._registers = None, 0, None
            if self._suspicion is None:
                self._become(State.UNKNOWN, seconds, "KVM hides the RIP of this guest")
            return
        late = seconds < self._last_record_seconds
        in_order = trusted and not late
        apart = seconds - self._last_record_seconds
        self._last_record_seconds = max(seconds, self._last_record_seconds)
        if self._suspicion and record.rip != self._suspicion.rip:
            if seconds < self._suspicion.first_seconds:
                return  # from before it came here
            self._prove(seconds, "it took a notify exit at another RIP")
        elif self._suspicion is None and self._rip not in (None, record.rip):
            self._prove(seconds, "it took notify exits at different RIPs")
        if late and self._suspicion is None:
            self._rip, self._streak, self._registers = None, 0, None
            return
        self._follow(record, seconds, apart, in_order)

    def _follow(self, record: NotifyExit, seconds: float, apart: float, in_order: bool) -> None:
        """Take in a record at the RIP of the one before, or at the first RIP that is known."""
        is_pair = in_order and record.rip == self._rip
        if is_pair:
            self.same_rip_exits += 1
            self._streak += 1
            if apart > 0:
                self.shortest_seconds = min(apart, self.shortest_seconds or apart)
                self.interval_seconds = min(apart, self.interval_seconds or apart)
        elif in_order or self._rip is None:
            self._rip, self._rip_seconds, self._streak = record.rip, seconds, 1
        if self._suspicion is None and is_pair and record.rip is not None:
            since, registers = self._registers or (0.0, None)
            self._suspicion = _Suspicion(record.rip, self._rip_seconds, registers, since, since)
            self._suspicion.nested = self._nested
            self._ended = None
            self._become(State.SUSPECT, seconds, "it took two notify exits in a row at one RIP")
        elif self._suspicion is None and self.state in (State.QUIET, State.UNKNOWN):
            self._become(State.NOTIFYING, seconds, "it takes notify exits")
        if self._suspicion:
            self._suspicion.streak = max(self._suspicion.streak, self._streak)
            self._suspicion.context_invalid = bool(record.qualification & abi.NOTIFY_VM_CONTEXT_INVALID)
            self._suspicion.idt_vectoring = record.idt_vectoring
            if in_order:
                self._watch_on(seconds)

    def _watch_on(self, seconds: float) -> None:
        """Let a record at the suspected RIP bear out what the span has seen before it."""
        span, suspicion = self._span, self._suspicion
        if suspicion and suspicion.stalled and self.state is State.UNKNOWN:
            self._become(State.STALLED, seconds, "it is still at the RIP at which it was stuck")
        if span is None or seconds < span.started:
            return
        if span.first_seconds is None:
            span.first_seconds = seconds
        span.last_seconds = max(span.last_seconds, seconds)
        span.records += 1
        span.exits = max(span.exits, span.records - 1)
        if span.pending and span.base is not None and seconds >= span.pending[0]:
            span.exits = max(span.exits, span.pending[1] - span.base)
        self._judge(seconds)

    def _count(self, began: float, ended: float, notify_exits: int, was_reset: bool) -> None:
        span = self._span
        if span is None or span.first_seconds is None or self._suspicion is None:
            return
        if was_reset:
            self._break_span()
        elif span.base is None:
            if began >= span.first_seconds:
                span.base = notify_exits
        else:
            span.pending = (ended, notify_exits)

    def _break_span(self) -> None:
        """Keep what the span has proved, and begin afresh."""
        if self._span is None:
            return
        if self._suspicion:
            self._suspicion.exits, self._suspicion.seconds = self._sum(self._suspicion)
        self._span = _Span(self._span.started)

    def _sum(self, suspicion: _Suspicion) -> tuple[int, float]:
        span = self._span
        if span is None or suspicion is not self._suspicion:
            return suspicion.exits, suspicion.seconds
        return suspicion.exits + span.exits, suspicion.seconds + span.seconds

    def _judge(self, now: float) -> None:
        suspicion = self._suspicion
        if suspicion is None or suspicion.stalled:
            return
        exits, seconds = self._sum(suspicion)
        if suspicion.registers is not None:
            seconds = min(seconds, suspicion.alike_until - suspicion.alike_since)
        if exits < self._rule.exits:
            return
        if suspicion.enough_seconds is None:
            suspicion.enough_seconds = now
        if seconds >= self._rule.seconds:
            ripe = self.ripe_seconds
            since = now if ripe is None else min(now, max(ripe, suspicion.enough_seconds))
            suspicion.stalled = True
            self._episode += 1
            self._become(State.STALLED, since, f"it took {exits} notify exits in a row at one RIP")

    def _prove(self, seconds: float, why: str) -> None:
        """Take in that the guest goes on: whatever was held against it is void."""
        self.proofs += 1
        suspicion = self._suspicion
        if suspicion:
            suspicion.exits, suspicion.seconds = self._sum(suspicion)
        was_stalled = suspicion is not None and suspicion.stalled
        if self.state is not State.RECOVERED or seconds - self._since >= RECOVERED_SECONDS or suspicion:
            self._ended = suspicion if was_stalled else None
            self._become(State.RECOVERED if was_stalled else State.PROGRESSING, seconds, why)
        self._suspicion = self._span = self._registers = self._rip = None
        self._streak = 0

    def _move(self, now: float) -> None:
        self.moved_seconds = now
        if self.state is State.QUIET or (
            self.state is State.RECOVERED and now - self._since >= RECOVERED_SECONDS and self._suspicion is None
        ):
            self._ended = None
            self._become(State.NOTIFYING, now, "it takes notify exits")

    def _rest(self, now: float) -> None:
        """Take in that the counter has not moved."""
        still = now - (self._since if self.moved_seconds is None else self.moved_seconds)
        if self.state is State.STALLED:
            if still >= max(STILL_SECONDS, STILL_INTERVALS * (self.interval_seconds or 0.0)):
                self._become(State.UNKNOWN, now, "its counter stands still: it may be paused")
        elif still >= QUIET_SECONDS and not (self._suspicion and self._suspicion.stalled):
            self._suspicion = self._ended = self._registers = self._rip = None
            self._streak = 0
            self._become(State.QUIET, now, "its counter stands still")

    def _become(self, state: State, now: float, why: str) -> None:
        self._why = why
        if state is not self.state:
            self.state, self._since = state, max(now, self._since)
            self._changes.append(self.verdict)

    def _take_changes(self) -> Sequence[Verdict]:
        changes, self._changes = self._changes, []
        return changes
