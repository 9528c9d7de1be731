"""Signs of life for the service manager, and what it shows: ``systemctl status`` has a line of the host's state.

A sign of life says two things. The event loop runs, as it comes from there; and nothing that the agent does for every
scrape or verdict has been under way for ``STUCK_SECONDS``. Without signs the service manager ends the agent and starts
another one: better than one that answers, shows old numbers and judges nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from exporter.host_summary import describe_blindness
from exporter.logs.rate_limit import RateLimitedLog
from exporter.service.manager import ServiceManager
from exporter.stalls.verdicts import MonitorReport, State
from kvm.model import Snapshot

# A snapshot waits for hung owners, and eBPF programs load for a minute under emulation: neither is stuck.
STUCK_SECONDS: Final = 120.0
STATUS_SECONDS: Final = 5.0
# What is older than this is said to be old. Hosts that cannot have notify exits are read every five minutes.
OLD_SECONDS: Final = 330.0
# So many signs fit into the time after which the service manager despairs: one that is late does no harm.
SIGNS: Final = 3
_GOES_ON: Final = (State.NOTIFYING, State.PROGRESSING, State.RECOVERED)


class Heartbeat:
    """Tells the service manager that the agent lives, as long as nothing of what it does is stuck.

    ``describe`` gives the line to show; each of ``find_begins`` says since when something has been under way, by
    ``clock``, None where nothing is.
    """

    def __init__(
        self,
        manager: ServiceManager,
        describe: Callable[[], str],
        find_begins: Sequence[Callable[[], float | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager, self._describe, self._find_begins, self._clock = manager, describe, find_begins, clock
        self._status = ""
        self._rate_limited_log = RateLimitedLog()

    async def run(self) -> None:
        """Beat until cancelled; ends at once where nobody listens."""
        watchdog_seconds = self._manager.watchdog_seconds
        pause = STATUS_SECONDS if watchdog_seconds is None else min(STATUS_SECONDS, watchdog_seconds / SIGNS)
        while self._manager.listens:
            self.beat()
            await asyncio.sleep(pause)

    def beat(self) -> None:
        """Say how the host is, if that is new, and give a sign of life."""
        stuck_seconds = self.find_stuck()
        status = f"stuck for {stuck_seconds:.0f} s, " * bool(stuck_seconds) + self.describe()
        if status != self._status and self._manager.tell(STATUS=status):
            self._status = status
        if self._manager.watchdog_seconds is None:
            return
        if not stuck_seconds:
            self._manager.tell(WATCHDOG=1)
            return
        text = "a reading of the host does not end: no sign of life for the service manager"
        self._rate_limited_log.write(logging.ERROR, text, seconds=round(stuck_seconds))

    def describe(self) -> str:
        """Return the line to show; one that cannot be had is no reason to look dead."""
        try:
            return self._describe()
        except Exception as err:  # noqa: BLE001 - the service manager would take an end of this task for a hang
            self._rate_limited_log.write(logging.ERROR, "the state of the host is not told", err=repr(err))
            return "the state of the host is not known"

    def find_stuck(self) -> float:
        """Return for how long something has been stuck, 0 where nothing is."""
        begins = [begin for find_begin in self._find_begins if (begin := find_begin()) is not None]
        busy_seconds = self._clock() - min(begins) if begins else 0.0
        return busy_seconds if busy_seconds >= STUCK_SECONDS else 0.0


def describe_state(snapshot: Snapshot | None, report: MonitorReport, now: float, *, has_failed: bool = False) -> str:
    """Say in a line how many VMs there are and what is the matter; who they are is not for every local user.

    ``has_failed`` says that the host could not be read since that snapshot.
    """
    if has_failed:
        return "blind: the host cannot be read, the log says why"
    if snapshot is None:
        return "the host has not been read yet"
    if snapshot.is_blind:
        return f"blind: {describe_blindness(snapshot)}"
    judged = Counter(found for vm in report.figures.values() for found in zip(vm.states, vm.can_judge, strict=True))
    states = Counter[State]()
    for (state, _), count in judged.items():
        states[state] += count
    counts = {
        "without a context": states[State.CONTEXT_LOST],
        "stalled": states[State.STALLED],
        "suspect": states[State.SUSPECT],
        "not judged": states[State.UNKNOWN] + sum(judged[state, False] for state in _GOES_ON),
    }
    vms = len(snapshot.readings)
    unknown = sum(reading.notify_exits is None for reading in snapshot.readings)
    parts = [f"{vms} VM{'' if vms == 1 else 's'}"]
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    parts += [f"{unknown} whose notify exits are not known"] * bool(unknown)
    parts += ["no source works"] * (not any(source.up for source in snapshot.sources))
    parts += ["others may be missing"] * (not snapshot.complete)
    parts += ["stalls are not detected"] * bool(report.problem)
    age = now - snapshot.monotonic_seconds
    return ", ".join(parts) + f"; {age:.0f} s ago" * (age > OLD_SECONDS)
