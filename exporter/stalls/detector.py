"""Who makes no forward progress: records, registers and counter readings of one vCPU in, verdicts out; pure.

A notify exit says that a guest opened no event window for a while. One is no proof of anything. A vCPU is stuck if it
takes them at one RIP, exit after exit, and shows no other sign of life. What counts, and what does not:

- **The RIP** is taken from trace records only; 0 is one like any other. Where it is not known (KVM cannot read the
  guest's registers, or the exit was out of an SGX enclave), nothing can be said, and equal unknowns are no pair.
- **A pair** are two records in a row, of one trace session, at one RIP. Records that come late, or beside lost ones,
  make no pair. A record at another RIP always proves progress, whenever it comes, unless it is older than the
  suspicion. So does the progress event (any exit at another RIP). What comes together is judged together: a stall is
  not called on records that come with proof of progress.
- **Observed.** Time and exits count towards a stall only while the progress event was armed and silent: from one record
  at the RIP to a later one, within one observation window. What happens between two sessions is not seen and counts for
  nothing; only long windows add up.
- **Exits** are a window's records, or those of KVM's own counter between two readings within a window, with a record at
  the RIP after the second: so they were all at that RIP.
- **Registers** other than RIP and RSP that change are progress: a REP instruction moves RCX while its RIP stays. Where
  they can be read they must have been alike for as long as the stall takes; where not, the verdict says so.
- **A nested guest** takes notify exits at RIPs of its own, and the trace does not tell whose a RIP is. While its
  hypervisor's timer ticks, its own stall shows as progress of the vCPU: the verdict says that it cannot tell.
- **CPU time** of the vCPU's thread tells a paused vCPU from a stuck one: the stuck one burns its core. It never calls a
  stall, nor forbids one: a stuck vCPU that its cgroup throttles uses little.
- **Context invalid** is the CPU's own word that it has lost the guest's state: it takes no second exit, and lasts until
  the vCPU leaves the guest again.
- **KVM itself** tells all of this where it has the project's patches, of every exit and without a trace: see
  ``exporter/stalls/kernel_evidence.py``. Observed is then what lies between two of its repeats, as far as no exits of
  other kinds but interrupts of the host came in between. The rule is the same; where the agent cannot read registers,
  KVM's comparison of them stands in.
- **Silence** proves nothing. A stuck vCPU whose counter stands still may be paused, and of one whose counter cannot be
  read nothing is known: both are ``unknown``.

Times are CLOCK_MONOTONIC seconds and come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from exporter.stalls.counter_track import CounterTrack
from exporter.stalls.evidence import CpuMeter, ObservationWindow, RecordRun, Suspicion, explain_stillness
from exporter.stalls.interval import explain_slowness
from exporter.stalls.kernel_evidence import Finding, KernelCounts, KernelEvidence, Kind
from exporter.stalls.verdicts import Evidence, StallRule, State, Verdict
from kvm import abi
from kvm.model import NotifyExit

# Without movement of the counter for so long a vCPU is quiet again.
QUIET_SECONDS: Final = 60.0
# Of a stuck vCPU whose counter cannot be read nothing is known after so long and one interval: a trigger tells of its
# first notify exit after five seconds.
UNREAD_SECONDS: Final = 6.0
# A stuck vCPU burns its core: one whose counter stands still for so long while its thread is idle is not stuck now.
PAUSED_SECONDS: Final = 1.0
# So that somebody sees it: a vCPU that goes on after a stall may take a last notify exit or two.
RECOVERED_SECONDS: Final = 15.0
# A vCPU that begins to take notify exits is read often for so long.
NEWS_SECONDS: Final = 3.0
# RIP is what is judged anyway, and on VMX neither is current in memory (VMX_REGS_LAZY_LOAD_SET).
NOT_COMPARED: Final = frozenset({"rip", "rsp"})

_NS: Final = 1_000_000_000


def ignore() -> None:
    """Tell nobody."""


class StallDetector:
    """Judges one vCPU; each ``observe`` returns the verdicts of the states that the vCPU has entered by it."""

    def __init__(self, rule: StallRule, now: float) -> None:
        self.on_change: Callable[[], None] = ignore
        """Called after the state, ``rip_hidden`` or a count of records has become another."""
        self.state = State.QUIET
        self.traced_exits = 0
        self.same_rip_exits = 0
        self.shortest_seconds: float | None = None
        """The shortest time seen between two records in a row at one RIP."""
        self.proofs = 0
        """How often progress has been proved, so that a session can tell whether it was in its time."""
        self.rip_hidden = False
        self.evidence: Evidence | None = None
        """What told of RIPs last."""
        self._rule = rule
        self._since = now
        self._reason = ""
        self._episode = 0
        self._counter = CounterTrack(now)
        self._last_record_seconds = float("-inf")
        self._run = RecordRun()
        self._nested: bool | None = None
        self._runs_nested = False  # whether a nested guest was seen to run since the vCPU was quiet
        self._suspicion: Suspicion | None = None
        self._ended: Suspicion | None = None
        self._window: ObservationWindow | None = None
        self._kernel = KernelEvidence()
        self._kernel_read: tuple[float, float] = (now, now)
        self._cpu = CpuMeter()
        self._exits_when_lost: int | None = None
        self._at_rip: float | None = None  # when it was last seen at the suspected RIP, by what is being taken in
        self._changes: list[Verdict] = []

    @property
    def rip(self) -> int | None:
        """The RIP at which the vCPU is suspected to be stuck, or was last seen; None where there is none."""
        return self._suspicion.rip if self._suspicion else self._run.rip

    @property
    def notify_exits(self) -> int | None:
        """The counter as it was last read."""
        return self._counter.value

    @property
    def moved_seconds(self) -> float | None:
        """When a notify exit was last known to have happened; None where none is."""
        return self._counter.moved_seconds

    @property
    def interval_seconds(self) -> float | None:
        """How long it takes, as far as is known, from one notify exit to the next."""
        return self._counter.interval.interval_seconds

    @property
    def verdict_seconds(self) -> float:
        """How long a session takes that can show a stall, all by itself."""
        interval = self.interval_seconds or 0.0
        return max(self._rule.seconds, self._rule.exits * interval) + 2 * interval

    @property
    def suspected(self) -> bool:
        """Whether there is a RIP at which the vCPU is, or was last known to be, stuck."""
        return self._suspicion is not None

    @property
    def interruptions(self) -> int:
        """How many readings left open what came between repeats, since a verdict was last possible without a trace."""
        return self._kernel.interruptions

    def is_undecided(self, now: float) -> bool:
        """Tell whether a verdict may follow soon: it is suspected, or its notify exits are news."""
        is_news = self.state is State.NOTIFYING and now - self._since < NEWS_SECONDS
        return is_news or self.state is State.SUSPECT

    @property
    def observing(self) -> bool:
        """Whether an observation window is open: proof of progress ends it."""
        return self._window is not None

    @property
    def ripe_seconds(self) -> float | None:
        """When the vCPU will have been suspect for long enough, if nothing speaks against it; None if it is not."""
        suspicion, window = self._suspicion, self._window
        if suspicion is None or suspicion.stalled:
            return None
        return suspicion.find_ripe(window, self._rule.seconds)

    @property
    def verdict(self) -> Verdict:
        """What is known now; may be asked from another thread."""
        # Read once: the event loop may forget them meanwhile.
        suspicion, ended, window, reason = self._suspicion, self._ended, self._window, self._reason
        if self.state in (State.NOTIFYING, State.SUSPECT) and self.evidence is not Evidence.KERNEL:
            reason += explain_slowness(self.interval_seconds or 0.0, self._rule.exits, self.state is State.SUSPECT)
        nested_unjudged = self._runs_nested and self.state in (State.PROGRESSING, State.RECOVERED)
        if nested_unjudged:
            reason += "; whether its nested guest is stuck cannot be told"
        verdict = Verdict(
            self.state,
            self._since,
            reason,
            nested=self._nested,
            cpu_percent=self._cpu.percent,
            episode=self._episode if suspicion or ended else 0,
            nested_unjudged=nested_unjudged,
            evidence=self.evidence,
        )
        if suspicion:
            return suspicion.complete(verdict, window)
        return ended.complete(verdict, None) if ended else verdict

    def observe_trigger(self, now: float) -> Sequence[Verdict]:
        """Take in that a notify exit has just happened."""
        self._move(now)
        return self._take_changes()

    def observe_counter(self, began: float, ended: float, notify_exits: int) -> Sequence[Verdict]:
        """Take in the counter, read between ``began`` and ``ended``."""
        if self._counter.is_late(began):
            return ()
        moved_by = self._counter.observe(ended, notify_exits)
        if self._window and self._counter.was_reset:
            self._window.interrupt()
        elif self._window and self._suspicion:
            self._window.take_count(began, ended, notify_exits)
        if moved_by:
            self._move(ended)
        elif moved_by is not None:
            self._rest(ended)
        return self._take_changes()

    def observe_unread(self, now: float) -> Sequence[Verdict]:
        """Take in that the counter cannot be read, or not any more: in time, what was known of the vCPU is not."""
        unread = self._counter.find_unread(now, self._last_record_seconds)
        stalled = self._suspicion is not None and self._suspicion.stalled
        limit = QUIET_SECONDS
        if stalled:
            limit = max(UNREAD_SECONDS + (self.interval_seconds or 0.0), self._counter.still_limit_seconds)
        if self.state not in (State.QUIET, State.CONTEXT_LOST) and unread >= limit:
            if not stalled:
                self._forget()
            self._enter(State.UNKNOWN, now, "its counter cannot be read")
        return self._take_changes()

    def observe_hidden(self, now: float, reason: str) -> Sequence[Verdict]:
        """Take in that the RIP of this vCPU cannot be had, and why."""
        self._hide(now, reason)
        return self._take_changes()

    def observe_records(
        self, now: float, records: Iterable[NotifyExit], *, lost: int = 0, other_rip: bool = False
    ) -> Sequence[Verdict]:
        """Take in what a trace has given: records, how many were lost, whether the progress event has fired."""
        self._at_rip = None
        self.evidence = Evidence.TRACE
        for record in sorted(records, key=lambda record: record.time_ns):
            self._take_record(record, trusted=not lost)
        if lost:
            self._run = RecordRun()
            if self._window:
                self._window.interrupt()
        self.on_change()
        if other_rip:
            self._prove(now, "it left the guest at another RIP")
        if self._at_rip is not None and self._suspicion:
            self._judge_records(self._suspicion, self._at_rip)
        return self._take_changes()

    def observe_kernel(
        self, began: float, ended: float, counts: KernelCounts, has_registers: bool = True
    ) -> Sequence[Verdict]:
        """Take in the statistics of a KVM with the project's patches, read between ``began`` and ``ended``.

        ``has_registers`` where registers were read with them, to be observed next: else KVM's comparison has to do.
        """
        before_began, before_ended = self._kernel_read
        finding = self._kernel.observe(counts, has_registers=has_registers)
        if not self._kernel.in_doubt:
            self._kernel_read = (began, ended)
        if counts.place is not None:
            was_hidden, self.rip_hidden = self.rip_hidden, False
            self.traced_exits += finding.exits
            self.same_rip_exits += finding.repeats
            if was_hidden or finding.exits or finding.repeats:
                self.on_change()
            self._runs_nested |= counts.last_guest_mode
        if finding.kind not in (Kind.NOTHING, Kind.INTERRUPTED):
            self.evidence = Evidence.KERNEL
        match finding.kind:
            case Kind.LOST:
                return self.observe_context_invalid(ended)
            case Kind.HIDDEN:
                self._hide(ended, finding.reason)
            case Kind.PROGRESS:
                self._prove(ended, finding.reason)
            case Kind.INTERRUPTED:
                self.end_window()
            case Kind.AT_RIP:
                self._take_repeats(before_began, before_ended, ended, counts, finding)
                if self._suspicion and not has_registers:
                    self._suspicion.take_registers(before_ended, ended, {})  # alike, by KVM's own comparison
                    self._judge(ended)
        return self._take_changes()

    def observe_registers(
        self, began: float, ended: float, registers: Mapping[str, int], nested: bool | None
    ) -> Sequence[Verdict]:
        """Take in the registers, those that are current, read between ``began`` and ``ended``; none: not known."""
        self._nested = nested
        self._runs_nested |= bool(nested)
        if not registers:
            return ()
        suspicion, run = self._suspicion, self._run
        if began < (suspicion.first_seconds if suspicion else run.first_seconds):
            return ()  # from before it came here
        compared = {name: value for name, value in registers.items() if name not in NOT_COMPARED}
        before = suspicion.registers if suspicion else run.registers[1] if run.registers else None
        changed = before is not None and [name for name in before if compared.get(name, before[name]) != before[name]]
        if changed:
            self._prove(ended, f"its registers changed: {' '.join(changed)}")
        elif suspicion:
            if self.evidence is not Evidence.KERNEL:  # which knows whose RIP it was, whatever has run since
                suspicion.nested = nested
            suspicion.take_registers(began, ended, compared)
            self._judge(ended)
        elif run.rip is not None and run.registers is None:
            run.registers = (ended, compared)
        return self._take_changes()

    def observe_cpu_time(self, now: float, cpu_seconds: float) -> None:
        """Take in how much CPU time, user and system, the vCPU's thread has used since it began."""
        self._cpu.observe(now, cpu_seconds)

    def observe_context_invalid(self, now: float) -> Sequence[Verdict]:
        """Take in that a notify exit came with an invalid context: whatever else was thought of the vCPU is void."""
        self._forget()
        self._window = self._exits_when_lost = None
        self._enter(State.CONTEXT_LOST, now, "the CPU has lost its state (context invalid)")
        return self._take_changes()

    def observe_exits(self, now: float, exits: int) -> Sequence[Verdict]:
        """Take in all exits of the vCPU: one whose state was lost runs again if it takes more of them."""
        if self.state is State.CONTEXT_LOST:
            if self._exits_when_lost is not None and exits != self._exits_when_lost:
                self._enter(State.NOTIFYING, now, "it runs again, after its state had been lost")
            self._exits_when_lost = exits
        return self._take_changes()

    def begin_session(self) -> None:
        """Say that records will come that are not in a row with those before: what happened meanwhile was not seen."""
        self._counter.interval.begin_session()
        self._kernel.forget()
        self._run = RecordRun()

    def start_window(self, now: float) -> None:
        """Say that from now on the progress event is armed, at the vCPU's RIP."""
        self.end_window()
        self._window = ObservationWindow(now)

    def end_window(self) -> None:
        """Say that the progress event is no longer armed."""
        suspicion, window = self._suspicion, self._window
        if suspicion and window and (suspicion.stalled or window.is_long):
            suspicion.add(window)
        self._window = None

    def _take_record(self, record: NotifyExit, trusted: bool) -> None:
        seconds = record.time_ns / _NS
        self.traced_exits += 1
        self.rip_hidden = False
        if record.rip is None:
            self._hide(seconds, "it was in an SGX enclave, where its RIP is not known")
            return
        late = seconds < self._last_record_seconds
        in_order = trusted and not late
        apart = seconds - self._last_record_seconds
        self._last_record_seconds = max(seconds, self._last_record_seconds)
        if self._suspicion and record.rip != self._suspicion.rip:
            if seconds < self._suspicion.first_seconds:
                return  # from before it came here
            self._prove(seconds, "it took a notify exit at another RIP")
        elif self._suspicion is None and self._run.rip not in (None, record.rip):
            self._prove(seconds, "it took notify exits at different RIPs")
        if late and self._suspicion is None:
            self._run = RecordRun()
            return
        self._extend_run(record, record.rip, seconds, apart, in_order)

    def _take_repeats(self, seen: float, after: float, until: float, counts: KernelCounts, finding: Finding) -> None:
        """Take in that a vCPU ``seen`` at a RIP took all its notify exits there, between ``after`` and ``until``."""
        if self._suspicion and self._suspicion.rip != counts.last_rip:
            self._prove(until, "it took a notify exit at another RIP")
        if self._suspicion is None:
            self._run = RecordRun(counts.last_rip, seen, counts.streak)
            self._suspect(counts.last_rip, until)
        suspicion = self._suspicion
        if suspicion is None:
            return
        suspicion.streak, suspicion.nested = counts.streak, counts.last_guest_mode
        window = self._window = self._window or ObservationWindow(after)
        window.take_exits(after, until, finding.exits)
        if suspicion.enough_seconds is None and suspicion.sum(window)[0] >= self._rule.exits:
            suspicion.enough_seconds = until
        if window.exits >= self._rule.exits and window.seconds >= self._rule.seconds:
            self._kernel.interruptions = 0  # it is watched for long enough without a trace
        self._judge_records(suspicion, until)

    def _hide(self, seconds: float, reason: str) -> None:
        self.rip_hidden = True
        self.on_change()
        self._run = RecordRun()
        if self._window:
            self._window.interrupt()
        if self._suspicion is None and self.state is not State.CONTEXT_LOST:
            self._enter(State.UNKNOWN, seconds, reason)

    def _extend_run(self, record: NotifyExit, rip: int, seconds: float, apart: float, in_order: bool) -> None:
        """Take in a record at the RIP of the one before, or at the first RIP that is known."""
        run = self._run
        is_pair = in_order and rip == run.rip
        if is_pair:
            self.same_rip_exits += 1
            run.length += 1
            if apart > 0:
                self.shortest_seconds = min(apart, self.shortest_seconds or apart)
                self._counter.interval.observe_pair(apart)
        elif in_order or run.rip is None:
            run = self._run = RecordRun(rip, seconds, 1)
        if self._suspicion is None and is_pair:
            self._suspect(rip, seconds)
        elif self._suspicion is None and self.state in (State.QUIET, State.UNKNOWN):
            self._enter(State.NOTIFYING, seconds, "it takes notify exits")
        if self._suspicion:
            self._suspicion.streak = max(self._suspicion.streak, run.length)
            self._suspicion.context_invalid = bool(record.qualification & abi.NOTIFY_VM_CONTEXT_INVALID)
            self._suspicion.idt_vectoring = record.idt_vectoring
            if in_order:
                self._observe_at_rip(self._suspicion, seconds)

    def _suspect(self, rip: int, seconds: float) -> None:
        since, registers = self._run.registers or (0.0, None)
        self._suspicion = Suspicion(rip, self._run.first_seconds, registers, since, since, nested=self._nested)
        self._ended = None
        self._cpu = CpuMeter()
        self._enter(State.SUSPECT, seconds, "it took two notify exits in a row at one RIP")

    def _observe_at_rip(self, suspicion: Suspicion, seconds: float) -> None:
        """Let a record at the suspected RIP bear out what the window has seen before it."""
        window, self._at_rip = self._window, seconds
        if window:
            window.take_record(seconds)
            if suspicion.enough_seconds is None and suspicion.sum(window)[0] >= self._rule.exits:
                suspicion.enough_seconds = seconds

    def _judge_records(self, suspicion: Suspicion, seconds: float) -> None:
        """Take in that the vCPU is at the suspected RIP, and that nothing that came with it says otherwise."""
        if suspicion.stalled and self.state is State.UNKNOWN:
            self._enter(State.STALLED, seconds, "it is still at the RIP at which it was stuck")
        self._judge(seconds)

    def _judge(self, now: float) -> None:
        suspicion = self._suspicion
        if suspicion is None or suspicion.stalled:
            return
        exits, seconds = suspicion.sum(self._window)
        if suspicion.registers is not None:
            seconds = min(seconds, suspicion.alike_until - suspicion.alike_since)
        if exits >= self._rule.exits and seconds >= self._rule.seconds:
            ripe, enough = self.ripe_seconds, suspicion.enough_seconds
            since = now if ripe is None or enough is None else min(now, max(ripe, enough))
            suspicion.stalled = True
            self._episode += 1
            self._enter(State.STALLED, since, f"it took {exits} notify exits in a row at one RIP")

    def _prove(self, seconds: float, reason: str) -> None:
        """Take in that the guest goes on: whatever was held against it is void."""
        self.proofs += 1
        suspicion = self._suspicion
        if suspicion:
            suspicion.add(self._window)
        was_stalled = suspicion is not None and suspicion.stalled
        if self.state is not State.RECOVERED or seconds - self._since >= RECOVERED_SECONDS or suspicion:
            self._ended = suspicion if was_stalled else None
            self._enter(State.RECOVERED if was_stalled else State.PROGRESSING, seconds, reason)
        self._suspicion = self._window = None
        self._run, self._cpu = RecordRun(), CpuMeter()

    def _move(self, now: float) -> None:
        self._counter.moved_seconds = now
        if self.state is State.NOTIFYING:
            return  # as nearly all in a flood of notify exits
        had_been_unread = self.state is State.UNKNOWN and not self.rip_hidden
        has_been_seen = self.state is State.RECOVERED and now - self._since >= RECOVERED_SECONDS
        if self.state is State.QUIET or (self._suspicion is None and (had_been_unread or has_been_seen)):
            self._ended = None
            self._enter(State.NOTIFYING, now, "it takes notify exits")

    def _rest(self, now: float) -> None:
        """Take in that the counter has not moved."""
        still = self._counter.find_still(now)
        if self.state is State.CONTEXT_LOST:
            return
        if self.state is State.STALLED:
            if still >= (PAUSED_SECONDS if self._cpu.is_idle else self._counter.still_limit_seconds):
                self._enter(State.UNKNOWN, now, explain_stillness(self._cpu))
        elif still >= QUIET_SECONDS and not (self._suspicion and self._suspicion.stalled):
            self._forget()
            self._enter(State.QUIET, now, "its counter stands still")

    def _forget(self) -> None:
        self._suspicion = self._ended = None
        self._runs_nested = False
        self._run, self._cpu = RecordRun(), CpuMeter()

    def _enter(self, state: State, now: float, reason: str) -> None:
        self._reason = reason
        if state is not self.state:
            self.state, self._since = state, max(now, self._since)
            self.on_change()
            self._changes.append(self.verdict)

    def _take_changes(self) -> Sequence[Verdict]:
        if not self._changes:
            return ()
        changes, self._changes = self._changes, []
        return changes
