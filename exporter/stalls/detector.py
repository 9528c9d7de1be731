"""Who makes no forward progress: records, registers and counter readings of one vCPU in, verdicts out; pure.

A notify exit says that a guest opened no event window for a while. One is no proof of anything. A vCPU is stuck if it
takes them at one RIP, exit after exit, and shows no other sign of life. What counts, and what does not:

- **The RIP** is taken from trace records only. Where KVM hides it, nothing can be said, and equal unknowns are no pair.
- **A pair** are two records in a row, of one look, at one RIP. Those that were lost, or that come late, prove nothing:
  they make no pair. A record at another RIP always proves progress, whenever it comes, unless it is older than the
  suspicion. So does any exit at another RIP (event B). What comes together is judged together: a stall is not called
  on records beside which lies the proof that the guest goes on.
- **Watched.** Time and exits count towards a stall only while event B was watched for and silent: from one record at
  the RIP to a later one, within one span. What happens between two looks is not seen, and counts nothing; only long
  spans add up.
- **Exits** are a span's records, or those of KVM's own counter, between two readings within a span, with a record at
  the RIP after the second: so they were all at that RIP.
- **Registers** other than RIP and RSP that change are progress: a REP instruction moves RCX while its RIP stays. Where
  they can be read they must have been alike for as long as the stall takes; where not, the verdict says so.
- **Silence** proves nothing. A stuck vCPU whose counter stands still may be paused, and of one whose counter cannot be
  read nothing is known: both are ``unknown``.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from exporter.stalls.evidence import ObservationWindow, Suspicion
from exporter.stalls.interval import LOOK_SECONDS, IntervalEstimator
from exporter.stalls.verdicts import StallRule, State, Verdict
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


class StallDetector:
    """Judges one vCPU; each ``observe`` returns the verdicts of the states that the vCPU has entered by it."""

    def __init__(self, rule: StallRule, now: float) -> None:
        self.state = State.QUIET
        self.traced_exits = 0
        self.same_rip_exits = 0
        self.moved_seconds: float | None = None
        """When a notify exit was last known to have happened."""
        self.shortest_seconds: float | None = None
        """The shortest time seen between two records in a row at one RIP."""
        self.proofs = 0
        """How often progress has been proved, so that a look can tell whether it was in its time."""
        self.rip_hidden = False
        self._rule = rule
        self._since = now
        self._reason = ""
        self._episode = 0
        self._counter: tuple[float, int] | None = None
        self._cadence = IntervalEstimator()
        self._last_record_seconds = float("-inf")
        self._rip: int | None = None
        self._rip_seconds = 0.0
        self._streak = 0
        self._registers: tuple[float, Mapping[str, int]] | None = None
        self._nested: bool | None = None
        self._suspicion: Suspicion | None = None
        self._ended: Suspicion | None = None
        self._span: ObservationWindow | None = None
        self._at_rip: float | None = None  # when it was last seen at the suspected RIP, by what is being taken in
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
    def interval_seconds(self) -> float | None:
        """How long it takes, as far as is known, from one notify exit to the next."""
        return self._cadence.interval_seconds

    @property
    def verdict_seconds(self) -> float:
        """How long a look takes that can show a stall, all by itself."""
        interval = self.interval_seconds or 0.0
        return max(self._rule.seconds, self._rule.exits * interval) + 2 * interval

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
        if suspicion is None or suspicion.stalled:
            return None
        return suspicion.find_ripe(span, self._rule.seconds)

    @property
    def verdict(self) -> Verdict:
        """What is known now; may be asked from another thread."""
        found = self._suspicion or self._ended
        if found is None:
            return Verdict(self.state, self._since, self._reason + self._find_slowness(), nested=self._nested)
        exits, _ = found.sum(self._span if found is self._suspicion else None)
        return Verdict(
            state=self.state,
            since_seconds=self._since,
            reason=self._reason + self._find_slowness(),
            rip=found.rip,
            streak=found.streak,
            exits=exits,
            stuck_since_seconds=found.first_seconds,
            registers_alike=found.registers_alike,
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
        before = self._counter
        if before is not None and began < before[0]:
            return ()  # an older reading that was handed over late
        self._counter = (ended, notify_exits)
        was_reset = before is not None and notify_exits < before[1]
        moved = 0 if before is None else notify_exits if was_reset else notify_exits - before[1]
        self._cadence.observe_reading(ended, 0 if was_reset else moved)
        if self._span and was_reset:
            self._span.interrupt()
        elif self._span and self._suspicion:
            self._span.take_count(began, ended, notify_exits)
        if moved:
            self._move(ended)
        elif before is not None:
            self._rest(ended)
        return self._take_changes()

    def observe_unread(self, now: float) -> Sequence[Verdict]:
        """Take in that the counter cannot be read, or not any more: in time, what was known of the vCPU is not."""
        read = self._since if self._counter is None else self._counter[0]
        unread = now - max(read, self._last_record_seconds, read if self.moved_seconds is None else self.moved_seconds)
        stalled = self._suspicion is not None and self._suspicion.stalled
        if self.state is not State.QUIET and unread >= (self._still_seconds if stalled else QUIET_SECONDS):
            if not stalled:
                self._forget()
            self._become(State.UNKNOWN, now, "its counter cannot be read")
        return self._take_changes()

    def observe_records(
        self, now: float, records: Iterable[NotifyExit], *, lost: int = 0, other_rip: bool = False
    ) -> Sequence[Verdict]:
        """Take in what a trace has given: records, how many were lost, whether event B has fired."""
        self._at_rip = None
        for record in sorted(records, key=lambda record: record.time_ns):
            self._take_record(record, trusted=not lost)
        if lost:
            self._rip, self._streak = None, 0
            if self._span:
                self._span.interrupt()
        if other_rip:
            self._prove(now, "it left the guest at another RIP")
        if self._at_rip is not None and self._suspicion:
            self._judge_records(self._suspicion, self._at_rip)
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
            suspicion.take_registers(began, ended, compared)
            self._judge(ended)
        elif self._rip is not None and self._registers is None:
            self._registers = (ended, compared)
        return self._take_changes()

    def begin_session(self) -> None:
        """Say that records will come that are not in a row with those before: what happened meanwhile was not seen."""
        self._cadence.begin_session()
        self._rip, self._streak, self._registers = None, 0, None

    def start_window(self, now: float) -> None:
        """Say that from now on event B is watched for, at the vCPU's RIP."""
        self.end_window()
        self._span = ObservationWindow(now)

    def end_window(self) -> None:
        """Say that event B is no longer watched for."""
        suspicion, span = self._suspicion, self._span
        if suspicion and span and (suspicion.stalled or span.is_long):
            suspicion.add(span)
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
                self._cadence.observe_pair(apart)
        elif in_order or self._rip is None:
            self._rip, self._rip_seconds, self._streak = record.rip, seconds, 1
        if self._suspicion is None and is_pair and record.rip is not None:
            since, registers = self._registers or (0.0, None)
            self._suspicion = Suspicion(record.rip, self._rip_seconds, registers, since, since)
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
        suspicion, span = self._suspicion, self._span
        self._at_rip = seconds
        if suspicion and span:
            span.take_record(seconds)
            if suspicion.enough_seconds is None and suspicion.sum(span)[0] >= self._rule.exits:
                suspicion.enough_seconds = seconds

    def _judge_records(self, suspicion: Suspicion, seconds: float) -> None:
        """Take in that the vCPU is at the suspected RIP, and that nothing that came with it says otherwise."""
        if suspicion.stalled and self.state is State.UNKNOWN:
            self._become(State.STALLED, seconds, "it is still at the RIP at which it was stuck")
        self._judge(seconds)

    def _judge(self, now: float) -> None:
        suspicion = self._suspicion
        if suspicion is None or suspicion.stalled:
            return
        exits, seconds = suspicion.sum(self._span)
        if suspicion.registers is not None:
            seconds = min(seconds, suspicion.alike_until - suspicion.alike_since)
        if exits >= self._rule.exits and seconds >= self._rule.seconds:
            ripe, enough = self.ripe_seconds, suspicion.enough_seconds
            since = now if ripe is None or enough is None else min(now, max(ripe, enough))
            suspicion.stalled = True
            self._episode += 1
            self._become(State.STALLED, since, f"it took {exits} notify exits in a row at one RIP")

    def _prove(self, seconds: float, reason: str) -> None:
        """Take in that the guest goes on: whatever was held against it is void."""
        self.proofs += 1
        suspicion = self._suspicion
        if suspicion:
            suspicion.add(self._span)
        was_stalled = suspicion is not None and suspicion.stalled
        if self.state is not State.RECOVERED or seconds - self._since >= RECOVERED_SECONDS or suspicion:
            self._ended = suspicion if was_stalled else None
            self._become(State.RECOVERED if was_stalled else State.PROGRESSING, seconds, reason)
        self._suspicion = self._span = self._registers = self._rip = None
        self._streak = 0

    def _move(self, now: float) -> None:
        self.moved_seconds = now
        had_been_unread = self.state is State.UNKNOWN and not self.rip_hidden
        has_been_seen = self.state is State.RECOVERED and now - self._since >= RECOVERED_SECONDS
        if self.state is State.QUIET or (self._suspicion is None and (had_been_unread or has_been_seen)):
            self._ended = None
            self._become(State.NOTIFYING, now, "it takes notify exits")

    def _rest(self, now: float) -> None:
        """Take in that the counter has not moved."""
        still = now - (self._since if self.moved_seconds is None else self.moved_seconds)
        if self.state is State.STALLED:
            if still >= self._still_seconds:
                self._become(State.UNKNOWN, now, "its counter stands still: it may be paused")
        elif still >= QUIET_SECONDS and not (self._suspicion and self._suspicion.stalled):
            self._forget()
            self._become(State.QUIET, now, "its counter stands still")

    @property
    def _still_seconds(self) -> float:
        return max(STILL_SECONDS, STILL_INTERVALS * (self.interval_seconds or 0.0))

    def _forget(self) -> None:
        self._suspicion = self._ended = self._registers = self._rip = None
        self._streak = 0

    def _find_slowness(self) -> str:
        """Return what to add to the evidence where exits come too slowly for the looks that there can be."""
        interval, exits = self.interval_seconds or 0.0, self._rule.exits
        if self.state in (State.NOTIFYING, State.SUSPECT) and 2 * interval > LOOK_SECONDS:
            return f", too slowly to be watched: one in some {interval:.1f} s"
        if self.state is State.SUSPECT and exits * interval > LOOK_SECONDS:
            return f", slowly: it takes several looks to watch {exits} of them"
        return ""

    def _become(self, state: State, now: float, reason: str) -> None:
        self._reason = reason
        if state is not self.state:
            self.state, self._since = state, max(now, self._since)
            self._changes.append(self.verdict)

    def _take_changes(self) -> Sequence[Verdict]:
        changes, self._changes = self._changes, []
        return changes
