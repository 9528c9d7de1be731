"""One vCPU that has taken notify exits in the agent's time, and when to look at it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from exporter.stalls.detector import StallDetector
from exporter.stalls.interval import LOOK_SECONDS
from exporter.stalls.verdicts import State, VcpuReport, Verdict
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Protection, Vcpu, VcpuKey, Vm, VmReading

SUSPECT_SECONDS: Final = 1.0
STALLED_SECONDS: Final = 10.0
# A vCPU that cannot be traced or judged is looked at again after ever longer pauses.
FIRST_PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 40.0
# Exits that come so much faster than before are news, if they come so fast that one look can tell what it is.
FASTER: Final = 3
# Two exits this far apart do not fall into one look, even if readings a second apart make it seem a second too long.
TOO_SLOW_SECONDS: Final = LOOK_SECONDS / 2 + 1.0
# How much of the vCPU's share of looks a look may use up: the more there is to see, the more of it.
ROUTINE_PART: Final = 2 / 3
SUSPECT_PART: Final = 0.9
NEWS_PART: Final = 1.0


@dataclass(slots=True)
class TrackedVcpu:
    """A vCPU with what is known of it.

    ``moved`` says that something has happened since the last look began, ``goes_on`` that it was a sign of life of a
    vCPU that was stuck, ``faster`` that notify exits come much faster than by the last look. ``problem`` is why a look
    has failed.
    """

    key: VcpuKey
    vm: Vm
    vcpu: Vcpu
    source: str
    progress: StallDetector
    window_cycles: int | None = None
    moved: bool = True
    goes_on: bool = False
    faster: bool = False
    look_at: float = 0.0
    pause: float = FIRST_PAUSE_SECONDS
    looking: bool = False
    problem: str = ""
    _counted_at: float = float("-inf")
    _counts: tuple[int, int | None] | None = None
    _slowest: float = LOOK_SECONDS

    def renew(self, reading: VmReading) -> tuple[int, int | None] | None:
        """Take names and numbers from a newer reading; return the counters in it, where they are."""
        self.vm, self.source = reading.vm, reading.source
        is_armed = reading.protection is Protection.ARMED
        self.window_cycles = reading.counters.notify_window_cycles if is_armed else None
        for position, vcpu in enumerate(reading.vcpus):
            if vcpu.vcpu_id == self.key.vcpu_id:
                self.vcpu = vcpu
                notify = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())
                exits = reading.counters.per_vcpu.get(EXITS, ())
                if position < len(notify):
                    return notify[position], exits[position] if position < len(exits) else None
        return None

    def see_counts(self, began: float, ended: float, notify_exits: int, exits: int | None) -> None:
        """Take in the counters, read between ``began`` and ``ended``, once the vCPU's progress has.

        A vCPU that was stuck and leaves the guest without the notify exit that is due may have gone on; one whose
        notify exits come much faster may have got stuck. Either is looked at soon.
        """
        if began < self._counted_at:
            return
        before, self._counts, self._counted_at = self._counts, (notify_exits, exits), ended
        if before is None:
            return
        progress, interval = self.progress, self.progress.interval_seconds or 0.0
        if notify_exits != before[0]:
            self.moved = True
            self._slowest = max(self._slowest, interval)
            in_one_look = progress.verdict_seconds <= LOOK_SECONDS
            self.faster |= in_one_look and not progress.suspected and interval * FASTER < self._slowest
        elif progress.suspected and None not in (exits, before[1]) and exits != before[1]:
            overdue = progress.moved_seconds is None or ended - progress.moved_seconds > 2 * interval
            self.moved |= overdue
            self.goes_on |= overdue
        if self.goes_on or self.faster:
            self.look_at = min(self.look_at, ended)

    def wants_look(self, now: float) -> bool:
        """Tell whether a look is due and may show something."""
        return not self.looking and self.moved and now >= self.look_at and self.vcpu.tid is not None and not self._idle

    @property
    def least_seconds(self) -> float:
        """How short a look may be that still shows something."""
        if self.goes_on:
            return 0.0  # it shows at once
        if self.faster or self.progress.state is State.SUSPECT:
            return self.progress.verdict_seconds
        # Two exits in a row, and a third to tell that nothing came between them.
        return 3 * (self.progress.interval_seconds or 0.0)

    @property
    def part(self) -> float:
        """How much of the vCPU's share of looks the next one may use up."""
        if self.goes_on or self.faster:
            return NEWS_PART
        return SUSPECT_PART if self.progress.state is State.SUSPECT else ROUTINE_PART

    @property
    def has_its_turn(self) -> bool:
        """Whether it was seen to go on, and is looked at again in turn with all others that do."""
        return self.progress.state in (State.PROGRESSING, State.RECOVERED) and not self._is_out_of_sight

    def begin_session(self) -> None:
        """Say that a look has begun: what has happened so far is being looked at."""
        self.looking = True
        self.moved = self.goes_on = self.faster = False

    def plan_look(self, now: float, turn: float) -> None:
        """Set when the next look may be, after one that has just ended; ``turn`` is for a vCPU that has its turn."""
        self._slowest = self.progress.interval_seconds or LOOK_SECONDS
        if self._is_out_of_sight:
            self.look_at = now + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
            return
        self.pause = FIRST_PAUSE_SECONDS
        stalled = self.progress.state is State.STALLED
        self.look_at = turn if self.has_its_turn else now + (STALLED_SECONDS if stalled else SUSPECT_SECONDS)

    @property
    def _is_out_of_sight(self) -> bool:
        return self.progress.rip_hidden or bool(self.problem)

    @property
    def _idle(self) -> bool:
        slow = (self.progress.interval_seconds or 0.0) > TOO_SLOW_SECONDS
        return slow and not (self.progress.suspected or self.goes_on or self.faster)


def build_report(vcpu: TrackedVcpu, verdict: Verdict | None, problem: str, now: float) -> VcpuReport:
    """Report a verdict, None for the newest; ``problem`` is why nothing can be traced. From any thread."""
    progress = vcpu.progress
    return VcpuReport(
        vm=vcpu.vm,
        vcpu=vcpu.vcpu,
        verdict=verdict or progress.verdict,
        source=vcpu.source,
        notify_exits=progress.notify_exits,
        moved_seconds=progress.moved_seconds,
        traced_exits=progress.traced_exits,
        same_rip_exits=progress.same_rip_exits,
        can_judge=not problem and not progress.rip_hidden and vcpu.vcpu.tid is not None,
        deferred_reason=_explain_put_off(vcpu, problem or vcpu.problem, now),
    )


def _explain_put_off(vcpu: TrackedVcpu, problem: str, now: float) -> str:
    """Say why nobody looks at a vCPU that has moved, "" where somebody does or a look would show nothing."""
    if vcpu.looking or not vcpu.moved:
        return ""
    if problem:
        return f"its exits cannot be traced: {problem}"
    if now < vcpu.look_at:
        return f"the next look is in {vcpu.look_at - now:.1f} s: each vCPU has its share of looks"
    return WAITS if vcpu.wants_look(now) else ""


WAITS: Final = "others have their turn"
