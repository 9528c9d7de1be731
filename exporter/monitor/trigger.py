"""Holds the trigger: attaches it where it can be attached, and asks it for what only it counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from exporter.monitor.backends import Run, Trigger
from kvm.bpf.notify_trigger import NotifyCall
from kvm.errors import SourceUnavailable

log = logging.getLogger(__name__)


class ManagedTrigger:
    """The trigger, attached or not; ``make`` is None where there is to be none. ``on_call`` takes what it tells of."""

    def __init__(
        self,
        make: Callable[[Callable[[NotifyCall], None]], Trigger] | None,
        run: Run,
        on_call: Callable[[NotifyCall], None],
    ) -> None:
        self.attached = False
        self.problem = "" if make is None else "not tried yet"
        """Why it is not attached; "" where it is, or where there is to be none."""
        self._make, self._run, self._on_call = make, run, on_call
        self._trigger: Trigger | None = None

    async def open(self) -> None:
        """Attach it, where it is not attached; how that went is logged when it changes."""
        if self.attached or self._make is None:
            return
        before, self._trigger = self.problem, self._trigger or self._make(self._on_call)
        try:
            status = await self._run(self._trigger.open)
        except SourceUnavailable as err:
            self.problem = str(err)
            if self.problem != before:
                fields = {"reason": err.reason, "remedy": err.remedy}
                log.warning("notify exits are found by polling", extra={"fields": fields})
            return
        if status.attached:
            asyncio.get_running_loop().add_reader(self._trigger.fd, self._trigger.deliver)
            self.attached = True
        self.problem = "" if status.attached else status.reason
        if self.problem != before:
            words = {"function": status.function, "attached": str(status.attached).lower(), "reason": status.reason}
            log.info("trigger for notify exits", extra={"fields": words})

    @property
    def lost(self) -> int:
        """How much it could not tell of or count, for want of room, since it was attached."""
        return sum(self._trigger.lost) if self._trigger is not None and self.attached else 0

    def read_context_invalid(self) -> dict[tuple[int, int, int, int], int] | None:
        """Read exits with an invalid context by pid, start_ticks, tid, vcpu_id; None where nobody counts them."""
        if self._trigger is None or not self.attached:
            return None
        try:
            found = self._trigger.read_context_invalid()
        except OSError as err:
            log.error("exits with an invalid context cannot be read", extra={"fields": {"err": str(err)}})
            return None
        return {(thread.pid, thread.start_ticks, thread.tid, thread.vcpu_id): found[thread] for thread in found}

    async def forget(self, ended: Collection[tuple[int, ...]]) -> None:
        """Forget what was counted for what has ended: processes, by pid and start_ticks, or threads, by all four."""
        trigger = self._trigger
        if trigger is None or not self.attached or not ended:
            return
        try:
            await self._run(lambda: trigger.forget(ended))
        except OSError as err:  # the table is full some day; then NotifyTrigger.lost counts
            log.error("exits with an invalid context cannot be forgotten", extra={"fields": {"err": str(err)}})

    async def close(self) -> None:
        """Detach it."""
        if self._trigger is not None:
            if self.attached:
                asyncio.get_running_loop().remove_reader(self._trigger.fd)
            self.attached = False
            await self._run(self._trigger.close)
