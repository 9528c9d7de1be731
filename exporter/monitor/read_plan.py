"""Which active vCPUs are read now, one by one: each once a second, and more often while a verdict is awaited.

That is how it is where KVM itself tells where notify exits are: readings are all there is. A guest that keeps many
vCPUs undecided does not cost the host more than so many readings a second.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from exporter.monitor.tracked_vcpu import TrackedVcpu

SECONDS: Final = 1.0
UNDECIDED_SECONDS: Final = 0.1
# A reading of one vCPU takes some 50 us; of those that are undecided and of all others there are each so many a second.
READS_PER_SECOND: Final = 320
_NEVER: Final = float("inf")


def find_next(active: Collection[TrackedVcpu], now: float) -> float:
    """Return when the next vCPU is due; infinity where there is none."""
    return min((due for due, _vcpu in _iterate(active, now)), default=_NEVER)


def choose_due(active: Collection[TrackedVcpu], now: float) -> list[TrackedVcpu]:
    """Return the vCPUs that are due, at most as many as may be read in a second."""
    due = sorted(((at, number) for number, (at, _) in enumerate(_iterate(active, now)) if at <= now))
    vcpus = list(active)
    return [vcpus[number] for _, number in due[:READS_PER_SECOND]]


def _iterate(active: Collection[TrackedVcpu], now: float) -> list[tuple[float, TrackedVcpu]]:
    undecided = sum(vcpu.detector.is_undecided(now) for vcpu in active)
    soon = max(UNDECIDED_SECONDS, undecided / READS_PER_SECOND)
    later = max(SECONDS, len(active) / READS_PER_SECOND)
    return [(vcpu.read_at + (soon if vcpu.detector.is_undecided(now) else later), vcpu) for vcpu in active]
