"""Decides, from what was seen, why VMs of this host may have been overlooked: the one place that does.

What cannot be seen must not look like what is not there. So every surface (metrics, readiness, exit codes, page,
alerts) asks here: where there is a blind spot, a count of VMs is not known and "no VM" is not said.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvm.model import BlindSpot

log = logging.getLogger(__name__)

# So many hidden processes are asked after in debugfs; more of them mean that we lack the rights to see anything.
REFUSED_PROCESSES = 16

# A reason that comes back sooner has not been away.
CLEAR_SECONDS = 60.0
_HIDDEN = "proc is mounted with hidepid= (in a unit: ProtectProc=); give CAP_SYS_PTRACE, or a proc without it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one snapshot has shown of its own limits.

    ``initial_pid_namespace`` is None where it is not known. ``works`` says whether any source does, ``finds_vms``
    whether one does that finds every VM of the host by itself. ``pending`` VMs have no known owner yet, ``hidden`` ones
    belong to processes that exist and that /proc does not show; ``over_budget`` ones are of a process or user with too
    many. ``sees_first_process`` is whether /proc shows process
    1; ``refused`` are processes whose fds may not be listed, and ``refused_may_hold_vms`` whether one of them may have
    a VM.
    """

    initial_pid_namespace: bool | None
    works: bool
    finds_vms: bool
    pending: int = 0
    hidden: int = 0
    over_budget: int = 0
    sees_first_process: bool = True
    refused: int = 0
    refused_may_hold_vms: bool = False


def find_blind_spots(seen: Evidence) -> tuple[BlindSpot, ...]:
    """Return why VMs may be missing, none where every VM of the host was seen."""
    spots = []
    if not seen.initial_pid_namespace:
        what = "this runs in" if seen.initial_pid_namespace is False else "it is not known whether this runs in"
        text = f"{what} a pid namespace of its own, where the host's processes are not visible; run with hostPID: true"
        spots.append(BlindSpot("pid_namespace", text))
    if not seen.works:
        spots.append(BlindSpot("no_source", "no source works: no counter of this host can be read"))
    if seen.hidden:
        spots.append(BlindSpot("hidden_processes", f"VMs of processes that /proc hides: {seen.hidden}; {_HIDDEN}"))
    if seen.pending:
        spots.append(BlindSpot("owners_pending", f"VMs whose owner has not been found out yet: {seen.pending}"))
    if seen.over_budget:
        text = f"VMs of a process or user that has too many: {seen.over_budget}; the log names the user"
        spots.append(BlindSpot("over_budget", text))
    if not seen.finds_vms:
        if not seen.sees_first_process:
            spots.append(BlindSpot("hidden_processes", f"/proc hides process 1, and others; {_HIDDEN}"))
        elif seen.refused > REFUSED_PROCESSES or seen.refused_may_hold_vms:
            text = f"processes whose fds may not be seen: {seen.refused}; give CAP_SYS_PTRACE"
            spots.append(BlindSpot("refused_processes", text))
    return tuple(spots)


class BlindSpotLog:
    """Writes why VMs may be missing, each reason once, and that none is left once that has lasted ``CLEAR_SECONDS``.

    A reason that comes and goes is written once, not each time. ``owners_pending`` does that with every new VM, and
    has lines of its own where it stays.
    """

    def __init__(self) -> None:
        self._logged: frozenset[str] = frozenset()
        self._clear_since: float | None = None

    def log_new(self, spots: Sequence[BlindSpot], now: float) -> None:
        """Take in those of a new snapshot; ``now`` is CLOCK_MONOTONIC seconds."""
        lasting = [spot for spot in spots if spot.reason != "owners_pending"]
        reasons = frozenset(spot.reason for spot in lasting)
        if not reasons <= self._logged:
            self._logged |= reasons
            text = "; ".join(spot.text for spot in lasting)
            log.warning("VMs of this host may not be seen", extra={"fields": {"reason": text}})
        if spots or not self._logged:
            self._clear_since = None
        elif self._clear_since is None:
            self._clear_since = now
        elif now - self._clear_since >= CLEAR_SECONDS:
            log.info("every VM of this host is seen")
            self._logged, self._clear_since = frozenset(), None
