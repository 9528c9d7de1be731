"""Which vCPUs have taken a notify exit with an invalid context, as the trigger counts them: each exit is news once.

Such an exit is exact and needs no trace: the CPU says that it has lost the guest's state. One is the normal case, since
the VMM stops the VM at it, so nothing may wait for a second. A VM that is reset keeps its threads, and its state may be
lost again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from exporter.monitor.thread_index import Found

Thread = tuple[int, int, int, int]
"""A vCPU's thread: pid, start_ticks, tid, vcpu_id."""

# A thread that no snapshot has after so long is reported without its VM.
PLACE_SECONDS: Final = 5.0


class ContextLosses:
    """The counts that have been reported, and the threads whose vCPU is not known yet."""

    def __init__(self) -> None:
        self._reported: dict[Thread, int] = {}
        self._waiting: dict[Thread, float] = {}

    @property
    def waiting(self) -> bool:
        """Whether a thread waits for a snapshot that has its vCPU."""
        return bool(self._waiting)

    def take(
        self, counts: Mapping[Thread, int], find: Callable[[Thread], Found | None], now: float
    ) -> tuple[list[Found], list[Thread]]:
        """Take in the counts; returns the vCPUs whose state was lost since, and threads whose vCPU is not known."""
        # What has ended may come back, as another.
        self._reported = {thread: count for thread, count in self._reported.items() if thread in counts}
        self._waiting = {thread: since for thread, since in self._waiting.items() if thread in counts}
        placed, unplaced = [], []
        for thread in [thread for thread, count in counts.items() if count > self._reported.get(thread, 0)]:
            found = find(thread)
            if found is not None:
                placed.append(found)
            elif now - self._waiting.setdefault(thread, now) < PLACE_SECONDS:
                continue
            else:
                unplaced.append(thread)
            self._waiting.pop(thread, None)
            self._reported[thread] = counts[thread]
        return placed, unplaced
