"""One vCPU that has taken notify exits in the agent's time, and when to look at it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from exporter.budget import VcpuKey
from exporter.progress import VcpuProgress
from exporter.verdicts import State
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Protection, Vcpu, Vm, VmReading

SUSPECT_SECONDS: Final = 1.0
STALLED_SECONDS: Final = 10.0
# A vCPU that makes progress, or that cannot be judged, is looked at again after ever longer pauses.
FIRST_PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 40.0


@dataclass(slots=True)
class Followed:
    """A vCPU with what is known of it.

    ``moved`` says that something has happened since the last look began, ``may_go_on`` that it was a sign of life of a
    vCPU that was stuck, ``problem`` why a look has failed.
    """

    key: VcpuKey
    vm: Vm
    vcpu: Vcpu
    source: str
    progress: VcpuProgress
    window_cycles: int | None = None
    exits: int | None = None
    moved: bool = True
    may_go_on: bool = False
    look_at: float = 0.0
    pause: float = FIRST_PAUSE_SECONDS
    looking: bool = False
    problem: str = ""

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

    def see_counts(self, now: float, took_notify_exits: bool, exits: int | None) -> None:
        """Take in whether the counters have moved.

        A vCPU that was stuck and leaves the guest without a notify exit may have gone on: that is looked at soon.
        """
        took_exits = self.exits is not None and exits is not None and exits != self.exits
        if exits is not None:
            self.exits = exits
        if took_notify_exits:
            self.moved = True
        elif took_exits and self.progress.suspected:
            self.moved = self.may_go_on = True
            self.look_at = min(self.look_at, now)

    def wants_look(self, now: float) -> bool:
        """Tell whether a look is due and may show something."""
        return not self.looking and self.moved and now >= self.look_at and self.vcpu.tid is not None

    def plan_look(self, now: float) -> float:
        """Set when the next look may be, after one that has just ended, and return it."""
        state = self.progress.state
        if state in (State.PROGRESSING, State.RECOVERED) or self.progress.rip_hidden or self.problem:
            self.look_at = now + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
        else:
            self.pause = FIRST_PAUSE_SECONDS
            self.look_at = now + (STALLED_SECONDS if state is State.STALLED else SUSPECT_SECONDS)
        return self.look_at
