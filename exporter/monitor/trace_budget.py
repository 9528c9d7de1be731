"""Who may be traced now: a guest that provokes trace sessions can neither slow its host nor hide its neighbours.

An armed thread pays for a trace record at each of its exits, and each session costs the agent something. So only a few
threads are armed at once, VMs are served round-robin, urgent vCPUs first, and each vCPU has a duty cycle: its first
session is free, and all others together may take a quota of each time window. A session asks for a part of the quota,
so that something is left for the one that matters. vCPUs that make progress, session after session, are traced in
rotation: the more there are, the longer each waits. Sessions that are deferred are counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from exporter.stalls.interval import SESSION_SECONDS
from kvm.model import VcpuKey, VmKey

# A session that is shorter than this shows nothing.
SHORTEST_SECONDS: Final = 0.2
# The rotation of vCPUs that make progress: how far apart its slots are, and how soon or late a vCPU comes round.
SLOT_SECONDS: Final = 0.25
SHORTEST_ROTATION_SECONDS: Final = 3.0
LONGEST_ROTATION_SECONDS: Final = 40.0
# Sums of floats are not exact: whoever waited until its quota was free must find it free.
_EPSILON: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """How many threads may be armed at once, on the host and of one VM, and one vCPU's duty cycle in any window."""

    host: int = 16
    vm: int = 4
    duty_cycle: float = 0.1
    window_seconds: float = 60.0


@dataclass(slots=True)
class _Past:
    """The sessions of one vCPU that have ended within the window, and whether its free one has been."""

    sessions: deque[tuple[float, float]] = field(default_factory=deque)
    first_done: bool = False


class TraceBudget:
    """Decides which of the wanted sessions may start; ``deferred`` counts those that had to wait, each once."""

    def __init__(self, limits: Limits) -> None:
        self.deferred = 0
        self._limits = limits
        # Sessions that wait for room, with the part of the quota that they may use: by VM, the one next in line first.
        self._urgent: dict[VmKey, dict[VcpuKey, float]] = {}
        self._waiting: dict[VmKey, dict[VcpuKey, float]] = {}
        # When the sessions under way began; None where the VM has been forgotten since.
        self._running: dict[VcpuKey, float | None] = {}
        self._past: dict[VcpuKey, _Past] = {}
        self._new: set[VcpuKey] = set()
        self._deferred: set[VcpuKey] = set()
        self._last_slot = 0.0

    @property
    def running(self) -> int:
        """How many sessions are under way."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether no more sessions may begin now, and all that wait have been counted: ``start`` changes nothing."""
        return len(self._running) >= self._limits.host and not self._new

    def want(
        self, key: VcpuKey, now: float, seconds: float = SHORTEST_SECONDS, part: float = 1.0, *, urgent: bool = False
    ) -> float:
        """Ask for a session of at least so many seconds, which may use up that part of the vCPU's quota.

        Returns when the quota allows it: if that is later than now, ask again then. While one is under way, asking
        again changes nothing; one that waits may become urgent.
        """
        if key in self._running:
            return now
        for queue in (self._urgent, self._waiting):
            waiting = queue.get(key.vm, {})
            if key in waiting:
                waiting[key] = max(part, waiting[key])
                if urgent and queue is self._waiting:
                    self._urgent.setdefault(key.vm, {})[key] = waiting.pop(key)
                return now
        longest = min(SESSION_SECONDS, self._find_quota(part))
        free = self._find_free(key, now, min(max(seconds, SHORTEST_SECONDS), longest), part)
        if free > now:
            self._count(key)
            return free
        (self._urgent if urgent else self._waiting).setdefault(key.vm, {})[key] = part
        if len(self._running) < self._limits.host:
            self._new.add(key)
        else:
            self._count(key)
        return now

    def is_waiting(self, key: VcpuKey, part: float, *, urgent: bool) -> bool:
        """Tell whether a session waits for room already that is no shorter, and as urgent: ``want`` changes nothing."""
        waiting = self._urgent.get(key.vm, {}).get(key)
        if waiting is None and not urgent:
            waiting = self._waiting.get(key.vm, {}).get(key)
        return waiting is not None and waiting >= part

    def drop(self, key: VcpuKey) -> None:
        """Let a vCPU wait no more; what it has used up of its quota stays so, in case that it comes back."""
        for queue in (self._urgent, self._waiting):
            queue.get(key.vm, {}).pop(key, None)
        self._new.discard(key)
        self._deferred.discard(key)

    def start(self, now: float) -> list[tuple[VcpuKey, float]]:
        """Return the sessions that begin now, with how many seconds each may take."""
        begun: list[tuple[VcpuKey, float]] = []
        while len(self._running) < self._limits.host:
            found = self._take_next()
            if found is None:
                break
            key, part = found
            begun.append((key, self._find_seconds(key, now, part)))
            self._running[key] = now
            self._new.discard(key)
            self._deferred.discard(key)
        for key in self._new:
            self._count(key)
        self._new.clear()
        return begun

    def _take_next(self) -> tuple[VcpuKey, float] | None:
        """Take the next vCPU out of its queue, with its part of the quota; None if none may start."""
        for queue in (self._urgent, self._waiting):
            for vm in list(queue):
                if not queue[vm]:
                    del queue[vm]  # its vCPUs have become urgent, or are gone
                elif self._has_room(vm):
                    waiting = queue.pop(vm)
                    key = next(iter(waiting))
                    part = waiting.pop(key)
                    if waiting:
                        queue[vm] = waiting  # behind the others
                    return key, part
        return None

    def end(self, key: VcpuKey, now: float) -> None:
        """Take in that a session has ended."""
        began = self._running.pop(key, None)
        if began is None:
            return
        past = self._past.setdefault(key, _Past())
        if past.first_done:
            past.sessions.append((began, now))
        past.first_done = True

    def find_slot(self, now: float) -> float:
        """Return when a vCPU that makes progress may be traced again, and take that slot of the rotation."""
        earliest, latest = now + SHORTEST_ROTATION_SECONDS, now + LONGEST_ROTATION_SECONDS
        self._last_slot = min(max(self._last_slot + SLOT_SECONDS, earliest), latest)
        return self._last_slot

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended; sessions under way still have to end, and leave nothing."""
        self._urgent.pop(vm, None)
        self._waiting.pop(vm, None)
        self._running = {key: None if key.vm == vm else began for key, began in self._running.items()}
        self._past = {key: past for key, past in self._past.items() if key.vm != vm}
        self._new = {key for key in self._new if key.vm != vm}
        self._deferred = {key for key in self._deferred if key.vm != vm}

    def _count(self, key: VcpuKey) -> None:
        if key not in self._deferred:
            self._deferred.add(key)
            self.deferred += 1

    def _has_room(self, vm: VmKey) -> bool:
        return sum(key.vm == vm for key in self._running) < self._limits.vm

    def _find_quota(self, part: float) -> float:
        """Return for how many seconds of a window a vCPU may be armed."""
        return self._limits.duty_cycle * self._limits.window_seconds * part

    def _list_sessions(self, key: VcpuKey, now: float) -> deque[tuple[float, float]] | None:
        """Return the sessions that count against a vCPU's quota, within the window; None before its first one."""
        past = self._past.get(key)
        if past is None or not past.first_done:
            return None
        oldest = now - self._limits.window_seconds
        while past.sessions and past.sessions[0][1] <= oldest:
            past.sessions.popleft()
        return past.sessions

    def _find_seconds(self, key: VcpuKey, now: float, part: float) -> float:
        """Return how long a vCPU may be armed from now on."""
        sessions = self._list_sessions(key, now)
        if sessions is None:
            return SESSION_SECONDS
        oldest = now - self._limits.window_seconds
        used = sum(ended - max(began, oldest) for began, ended in sessions)
        return min(SESSION_SECONDS, self._find_quota(part) - used)

    def _find_free(self, key: VcpuKey, now: float, seconds: float, part: float) -> float:
        """Return from when on a vCPU may be armed for so long."""
        missing = seconds - self._find_seconds(key, now, part)
        window = self._limits.window_seconds
        for began, ended in self._list_sessions(key, now) or ():
            if missing <= _EPSILON:
                break
            leaves = max(began + window, now)  # when it begins to leave the window
            length = ended + window - leaves
            now = leaves + min(missing, length)
            missing -= length
        return now
