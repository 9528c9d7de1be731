"""One vCPU that has taken a notify exit since the agent started, and when to trace it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from exporter.stalls.detector import StallDetector
from exporter.stalls.interval import SESSION_SECONDS
from exporter.stalls.verdicts import State, VcpuFigures, VcpuReport, Verdict
from kvm.model import Instruction, Protection, Vcpu, VcpuKey, Vm, VmReading

# After so many readings in which other exits came between repeats, a trace has to tell what they are.
INTERRUPTIONS: Final = 5
SUSPECT_SECONDS: Final = 1.0
STALLED_SECONDS: Final = 10.0
# A vCPU that cannot be traced or judged is tried again after ever longer pauses.
FIRST_PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 40.0
# Exits that come so much faster than before are news, if one session can tell what that is.
FASTER: Final = 3
# A vCPU whose notify exits are so large a part of all its exits does little else: it may be stuck.
OTHER_EXITS: Final = 50
# Two exits this far apart do not fall into one session, even if the estimate is a second too long.
TOO_SLOW_SECONDS: Final = SESSION_SECONDS / 2 + 1.0
# How much of the vCPU's quota a session may use up: the more there is to see, the more of it.
ROUTINE_QUOTA: Final = 2 / 3
SUSPECT_QUOTA: Final = 0.9
NEWS_QUOTA: Final = 1.0

# notify_window_exits, and exits where they are known.
Counts = tuple[int, int | None]


@dataclass(slots=True)
class TrackedVcpu:
    """A vCPU with what is known of it.

    ``moved`` says that something has happened since the last session began, ``goes_on`` that it was a sign of life of
    a vCPU that was stuck, ``faster`` that notify exits come much faster than in the last session, ``urgent`` that it
    takes hardly any other exits: it is traced before others. ``problem`` is why the last session failed.
    ``told_by_kernel`` says that KVM itself tells where it is, ``has_registers`` that its registers can be read,
    ``read_at`` when it was last read by itself. ``instruction`` was read last; ``instruction_tried`` says at which RIP,
    and from when on again.
    """

    key: VcpuKey
    vm: Vm
    vcpu: Vcpu
    source: str
    detector: StallDetector
    window_cycles: int | None = None
    moved: bool = True
    goes_on: bool = False
    faster: bool = False
    urgent: bool = False
    next_session_at: float = 0.0
    pause: float = FIRST_PAUSE_SECONDS
    in_session: bool = False
    problem: str = ""
    told_by_kernel: bool = False
    has_registers: bool = True
    read_at: float = float("-inf")
    instruction: Instruction | None = None
    instruction_tried: tuple[int | None, float] = (None, float("-inf"))
    considered_at: float = float("-inf")
    _counted_at: float = float("-inf")
    _counts: tuple[int, int | None] | None = None
    _slowest: float = SESSION_SECONDS

    @property
    def figures(self) -> VcpuFigures:
        """What metrics tell of it. From any thread."""
        detector = self.detector
        state, stuck_since = detector.state, None
        if state is State.STALLED:  # of others a verdict, with its reason in words, is not worth its time
            verdict = detector.verdict
            state = verdict.state
            stuck_since = verdict.stuck_since_seconds if state is State.STALLED else None
        return VcpuFigures(
            state,
            stuck_since,
            detector.traced_exits,
            detector.same_rip_exits,
            self.can_judge,
        )

    @property
    def can_judge(self) -> bool:
        """Whether it can be told where it is, if anything tells that on this host."""
        return not self.detector.rip_hidden and self.vcpu.tid is not None

    def see_counts(self, began: float, ended: float, notify_exits: int, exits: int | None) -> bool:
        """Take in the counters, read between ``began`` and ``ended``, once the detector has.

        A vCPU that was stuck and leaves the guest without the notify exit that is due may have gone on; one whose
        notify exits come much faster may have got stuck. Either is traced soon: tells whether there is such news.
        """
        if began < self._counted_at:
            return False
        before, self._counts, self._counted_at = self._counts, (notify_exits, exits), ended
        if before is None:
            return True
        known = self.moved, self.urgent, self.goes_on, self.faster
        detector, interval = self.detector, self.detector.interval_seconds or 0.0
        if notify_exits != before[0]:
            self.moved = True
            if exits is not None and before[1] is not None:
                self.urgent = exits - before[1] < OTHER_EXITS * (notify_exits - before[0])
            if interval > self._slowest:
                self._slowest = interval
            elif not self.faster and interval * FASTER < self._slowest and not detector.suspected:
                self.faster = detector.verdict_seconds <= SESSION_SECONDS
        elif detector.suspected and None not in (exits, before[1]) and exits != before[1]:
            overdue = detector.moved_seconds is None or ended - detector.moved_seconds > 2 * interval
            self.moved |= overdue
            self.goes_on |= overdue
        if self.goes_on or self.faster:
            self.next_session_at = min(self.next_session_at, ended)
        return known != (self.moved, self.urgent, self.goes_on, self.faster)

    def wants_session(self, now: float) -> bool:
        """Tell whether a session is due and may show something."""
        return (
            not self.in_session
            and not self.told_by_kernel
            and self.moved
            and now >= self.next_session_at
            and self.vcpu.tid is not None
            and not self._idle
        )

    def find_instruction(self, verdict: Verdict) -> Instruction | None:
        """Return the instruction that a verdict is about; None where another one was read last."""
        found = self.instruction
        is_there = found is not None and (found.rip, found.guest_mode) == (verdict.rip, bool(verdict.nested))
        return found if is_there else None

    @property
    def needs_trace(self) -> bool:
        """Whether only a trace can tell where it is, although KVM tells where its notify exits are.

        Such as whether a stuck one that takes other exits instead goes on: its registers tell, if they are read.
        """
        return self.detector.interruptions >= INTERRUPTIONS or (self.goes_on and not self.has_registers)

    @property
    def least_seconds(self) -> float:
        """How short a session may be that still shows something."""
        if self.goes_on:
            return 0.0  # it shows at once
        if self.faster or self.detector.state is State.SUSPECT:
            return self.detector.verdict_seconds
        # Two exits in a row, and a third to tell that nothing came between them.
        return 3 * (self.detector.interval_seconds or 0.0)

    @property
    def quota_part(self) -> float:
        """How much of the vCPU's quota the next session may use up."""
        if self.goes_on or self.faster:
            return NEWS_QUOTA
        return SUSPECT_QUOTA if self.detector.state is State.SUSPECT else ROUTINE_QUOTA

    @property
    def in_rotation(self) -> bool:
        """Whether it was seen to make progress, and is traced again in rotation with all others that do."""
        return self.detector.state in (State.PROGRESSING, State.RECOVERED) and not self._is_out_of_sight

    def begin_session(self) -> None:
        """Take in that a session has begun: it covers what has happened so far."""
        self.in_session = True
        self.moved = self.goes_on = self.faster = False

    def plan_next_session(self, now: float, slot: float) -> None:
        """Set when the next session may be, after one that has just ended; ``slot`` is for a vCPU in rotation."""
        self._slowest = self.detector.interval_seconds or SESSION_SECONDS
        if self._is_out_of_sight:
            self.next_session_at = now + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
            return
        self.pause = FIRST_PAUSE_SECONDS
        stalled = self.detector.state is State.STALLED
        self.next_session_at = slot if self.in_rotation else now + (STALLED_SECONDS if stalled else SUSPECT_SECONDS)

    @property
    def _is_out_of_sight(self) -> bool:
        return self.detector.rip_hidden or bool(self.problem)

    @property
    def _idle(self) -> bool:
        slow = (self.detector.interval_seconds or 0.0) > TOO_SLOW_SECONDS
        return slow and not (self.detector.suspected or self.goes_on or self.faster)


def find_window(reading: VmReading) -> int | None:
    """Find the window in cycles after which a VM's vCPUs take notify exits, None where it is off or not known."""
    return reading.counters.notify_window_cycles if reading.protection is Protection.ARMED else None


def build_report(vcpu: TrackedVcpu, verdict: Verdict | None, problem: str, now: float) -> VcpuReport:
    """Report a verdict, None for the newest; ``problem`` is why nothing can be traced. From any thread."""
    detector = vcpu.detector
    verdict = verdict or detector.verdict
    return VcpuReport(
        vm=vcpu.vm,
        vcpu=vcpu.vcpu,
        verdict=verdict,
        instruction=vcpu.find_instruction(verdict),
        source=vcpu.source,
        notify_exits=detector.notify_exits,
        moved_seconds=detector.moved_seconds,
        traced_exits=detector.traced_exits,
        same_rip_exits=detector.same_rip_exits,
        can_judge=not problem and vcpu.can_judge,
        deferred_reason=_explain_deferral(vcpu, problem or vcpu.problem, now),
    )


def _explain_deferral(vcpu: TrackedVcpu, problem: str, now: float) -> str:
    """Say why a vCPU that has moved is not traced now, "" where it is or where tracing would show nothing."""
    if vcpu.in_session or vcpu.told_by_kernel or not vcpu.moved:
        return ""
    if problem:
        return f"its exits cannot be traced: {problem}"
    if now < vcpu.next_session_at:
        return f"the next trace session is in {vcpu.next_session_at - now:.1f} s: a vCPU is traced a part of the time"
    return OTHERS_FIRST if vcpu.wants_session(now) else ""


OTHERS_FIRST: Final = "other vCPUs are traced first"
