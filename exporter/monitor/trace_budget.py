"""Who may be looked at now: a guest that provokes looks can neither slow its host nor hide its neighbours.

An armed thread pays for a trace record at each of its exits, and each look costs the agent something. So threads are
armed a few at a time, VMs take turns, and one vCPU is armed for a small part of the time only; its first look is free.
A look says how much of that part it may use up, so that something is left for the one that matters. vCPUs that are seen
to go on, look after look, take turns as well: the more there are, the longer each waits. What is put off is counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from exporter.stalls.interval import LOOK_SECONDS
from kvm.model import VcpuKey, VmKey

# A look that is shorter than this shows nothing.
SHORTEST_SECONDS: Final = 0.2
# Looks at vCPUs that go on: so far apart, and each of them again after so long at least, and at most.
TURN_SECONDS: Final = 0.25
SHORTEST_TURN_SECONDS: Final = 3.0
LONGEST_TURN_SECONDS: Final = 40.0
# Sums of times are not exact, and who has waited until its share was free must find it free.
_EPSILON: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be armed: on the host and of one VM at once, and which share of any window of one vCPU's time."""

    host: int = 16
    vm: int = 4
    share: float = 0.1
    window_seconds: float = 60.0


@dataclass(slots=True)
class _Past:
    """The looks at one vCPU that have ended within the window, and whether there has been a first one."""

    looks: deque[tuple[float, float]] = field(default_factory=deque)
    looked: bool = False


class TraceBudget:
    """Decides which of the wanted looks may start; ``exhausted`` counts those that were put off, each once."""

    def __init__(self, limits: Limits) -> None:
        self.exhausted = 0
        self._limits = limits
        # Looks that wait for room, with the part of the share that they may use: by VM, in the order of their turns.
        self._waiting: dict[VmKey, dict[VcpuKey, float]] = {}
        # When looks under way began; None where the VM has been forgotten since.
        self._running: dict[VcpuKey, float | None] = {}
        self._past: dict[VcpuKey, _Past] = {}
        self._new: set[VcpuKey] = set()
        self._put_off: set[VcpuKey] = set()
        self._turn = 0.0

    @property
    def running(self) -> int:
        """How many looks are under way."""
        return len(self._running)

    def want(self, key: VcpuKey, now: float, seconds: float = SHORTEST_SECONDS, part: float = 1.0) -> float:
        """Ask for a look of at least so many seconds, which may use up that part of the vCPU's share.

        Returns when the share allows it: if that is later than now, ask again then. One that waits or is under way
        already is the same look.
        """
        if key in self._running:
            return now
        waiting = self._waiting.get(key.vm, {})
        if key in waiting:
            waiting[key] = max(part, waiting[key])
            return now
        longest = min(LOOK_SECONDS, self._find_share(part))
        free = self._find_free(key, now, min(max(seconds, SHORTEST_SECONDS), longest), part)
        if free > now:
            self._count(key)
            return free
        self._waiting.setdefault(key.vm, {})[key] = part
        self._new.add(key)
        return now

    def start(self, now: float) -> list[tuple[VcpuKey, float]]:
        """Return the looks that begin now, with how many seconds each may take."""
        begun: list[tuple[VcpuKey, float]] = []
        while len(self._running) < self._limits.host:
            vm = next((vm for vm in self._waiting if self._has_room(vm)), None)
            if vm is None:
                break
            waiting = self._waiting.pop(vm)
            key = next(iter(waiting))
            part = waiting.pop(key)
            if waiting:
                self._waiting[vm] = waiting  # behind the others
            begun.append((key, self._find_seconds(key, now, part)))
            self._running[key] = now
            self._new.discard(key)
            self._put_off.discard(key)
        for key in self._new:
            self._count(key)
        self._new.clear()
        return begun

    def end(self, key: VcpuKey, now: float) -> None:
        """Say that a look has ended."""
        began = self._running.pop(key, None)
        if began is None:
            return
        past = self._past.setdefault(key, _Past())
        if past.looked:
            past.looks.append((began, now))
        past.looked = True

    def find_turn(self, now: float) -> float:
        """Return when a vCPU that goes on may be looked at again, and take that turn."""
        self._turn = min(max(self._turn + TURN_SECONDS, now + SHORTEST_TURN_SECONDS), now + LONGEST_TURN_SECONDS)
        return self._turn

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended; looks under way still have to end, and leave nothing."""
        self._waiting.pop(vm, None)
        self._running = {key: None if key.vm == vm else began for key, began in self._running.items()}
        self._past = {key: past for key, past in self._past.items() if key.vm != vm}
        self._new = {key for key in self._new if key.vm != vm}
        self._put_off = {key for key in self._put_off if key.vm != vm}

    def _count(self, key: VcpuKey) -> None:
        if key not in self._put_off:
            self._put_off.add(key)
            self.exhausted += 1

    def _has_room(self, vm: VmKey) -> bool:
        return sum(key.vm == vm for key in self._running) < self._limits.vm

    def _find_share(self, part: float) -> float:
        """Return for how many seconds of a window a vCPU may be armed."""
        return self._limits.share * self._limits.window_seconds * part

    def _find_looks(self, key: VcpuKey, now: float) -> deque[tuple[float, float]] | None:
        """Return the looks that count at a vCPU's share, within the window; None before its first one."""
        past = self._past.get(key)
        if past is None or not past.looked:
            return None
        oldest = now - self._limits.window_seconds
        while past.looks and past.looks[0][1] <= oldest:
            past.looks.popleft()
        return past.looks

    def _find_seconds(self, key: VcpuKey, now: float, part: float) -> float:
        """Return how long a vCPU may be armed from now on."""
        looks = self._find_looks(key, now)
        if looks is None:
            return LOOK_SECONDS
        oldest = now - self._limits.window_seconds
        used = sum(ended - max(began, oldest) for began, ended in looks)
        return min(LOOK_SECONDS, self._find_share(part) - used)

    def _find_free(self, key: VcpuKey, now: float, seconds: float, part: float) -> float:
        """Return from when on a vCPU may be armed for so long."""
        missing = seconds - self._find_seconds(key, now, part)
        window = self._limits.window_seconds
        for began, ended in self._find_looks(key, now) or ():
            if missing <= _EPSILON:
                break
            leaves = max(began + window, now)  # when it begins to leave the window
            length = ended + window - leaves
            now = leaves + min(missing, length)
            missing -= length
        return now
