"""Who may be looked at now: a guest that provokes looks can neither slow its host nor hide its neighbours.

An armed thread pays for a trace record at each of its exits, and each look costs the agent something. So threads are
armed a few at a time, VMs take turns, and one vCPU is armed for a small part of the time only; its first look is free.
A part of that part is kept for the look that may show that a stuck vCPU goes on. What is put off is counted once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvm.model import VmKey

LOOK_SECONDS: Final = 5.0
# A look that is shorter than this shows nothing.
SHORTEST_SECONDS: Final = 0.2


class VcpuKey(NamedTuple):
    """One vCPU of one VM, by KVM's id."""

    vm: VmKey
    vcpu_id: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be armed: on the host and of one VM at once, and which share of any window of one vCPU's time.

    ``reserve`` is the part of that share that is kept for looks that ask for it.
    """

    host: int = 16
    vm: int = 4
    share: float = 0.1
    reserve: float = 0.2
    window_seconds: float = 60.0


@dataclass(slots=True)
class _Wanted:
    """A look that waits for its turn: the least time it takes, may it use the reserve, was it counted as put off."""

    seconds: float
    from_reserve: bool = False
    counted: bool = False


@dataclass(slots=True)
class _Past:
    """The looks at one vCPU that have ended within the window, and whether there has been a first one."""

    looks: deque[tuple[float, float]] = field(default_factory=deque)
    looked: bool = False


class LookBudget:
    """Decides which of the wanted looks may start; ``exhausted`` counts those that were put off."""

    def __init__(self, limits: Limits) -> None:
        self.exhausted = 0
        self._limits = limits
        # By VM, in the order of their turns.
        self._wanted: dict[VmKey, dict[VcpuKey, _Wanted]] = {}
        self._running: dict[VcpuKey, float] = {}
        self._past: dict[VcpuKey, _Past] = {}

    @property
    def running(self) -> int:
        """How many looks are under way."""
        return len(self._running)

    def want(self, key: VcpuKey, seconds: float = SHORTEST_SECONDS, *, from_reserve: bool = False) -> None:
        """Ask for a look of at least so many seconds; one that is asked for or under way already is the same."""
        if key not in self._running:
            longest = min(LOOK_SECONDS, self._find_share(from_reserve=False))
            least = SHORTEST_SECONDS if from_reserve else min(max(seconds, SHORTEST_SECONDS), longest)
            wanted = self._wanted.setdefault(key.vm, {}).setdefault(key, _Wanted(least))
            if from_reserve:
                wanted.seconds, wanted.from_reserve = least, True

    def start(self, now: float) -> list[tuple[VcpuKey, float]]:
        """Return the looks that begin now, with how many seconds each may take."""
        begun: list[tuple[VcpuKey, float]] = []
        while len(self._running) < self._limits.host:
            found = next((key for vm in self._wanted if (key := self._find(vm, now))), None)
            if found is None:
                break
            wanted = self._wanted.pop(found.vm)
            look = wanted.pop(found)
            if wanted:
                self._wanted[found.vm] = wanted  # behind the others
            begun.append((found, self._find_seconds(found, now, look.from_reserve)))
            self._running[found] = now
        for waiting in (look for wanted in self._wanted.values() for look in wanted.values() if not look.counted):
            waiting.counted = True
            self.exhausted += 1
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

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended; looks under way still have to end."""
        self._wanted.pop(vm, None)
        self._past = {key: past for key, past in self._past.items() if key.vm != vm}

    def _find(self, vm: VmKey, now: float) -> VcpuKey | None:
        if sum(key.vm == vm for key in self._running) >= self._limits.vm:
            return None
        wanted = self._wanted[vm]
        for key, look in wanted.items():
            if self._find_seconds(key, now, look.from_reserve) >= look.seconds:
                return key
        return None

    def _find_seconds(self, key: VcpuKey, now: float, from_reserve: bool) -> float:
        """Return how long a vCPU may be armed from now on."""
        past = self._past.get(key)
        if past is None or not past.looked:
            return LOOK_SECONDS
        oldest = now - self._limits.window_seconds
        while past.looks and past.looks[0][1] <= oldest:
            past.looks.popleft()
        used = sum(ended - max(began, oldest) for began, ended in past.looks)
        return min(LOOK_SECONDS, self._find_share(from_reserve) - used)

    def _find_share(self, from_reserve: bool) -> float:
        """Return for how many seconds of a window a vCPU may be armed."""
        share = self._limits.share * self._limits.window_seconds
        return share if from_reserve else share * (1 - self._limits.reserve)
