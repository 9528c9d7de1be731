"""Holds the trigger: attaches it where it can be attached, asks it for what only it counts, and checks what it tells.

It tells of each thread that takes notify exits at least once in ``AGAIN_SECONDS``. So a counter that has moved while
the trigger told nothing of its vCPU or thread for so long, and lost nothing, shows that the kernel does not call the
function for every notify exit.

What it tells is taken at once, and what comes within ``GATHER_SECONDS`` after that together: thousands of vCPUs that
take notify exits do not cost a turn of the event loop each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Container
from typing import Final

from exporter.history.changes import Moved
from exporter.logs.rate_limit import RateLimitedLog
from exporter.monitor.backends import Run, Trigger
from kvm.bpf.notify_trigger import AGAIN_SECONDS, NotifyCall
from kvm.errors import SourceUnavailable
from kvm.model import VcpuKey, VmKey

log = logging.getLogger(__name__)

# A turn of the event loop takes 0.1 ms of CPU time, a call some 2 us, and 10,000 vCPUs make two thousand a second.
GATHER_SECONDS: Final = 0.05
# No two polls lie further apart.
KEPT_SECONDS: Final = 600.0
NS_PER_SECOND: Final = 1_000_000_000
_MISSED: Final = "the trigger told nothing of a vCPU's notify exits: from now on counters are polled as without it"


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
        self.missed = 0
        """How often a counter had moved and the trigger had told nothing of it."""
        self.missed_vcpus: frozenset[VcpuKey] = frozenset()
        """The vCPUs whose counters those were."""
        self._make, self._run, self._on_call = make, run, on_call
        self._attached_at = 0.0
        self._lost_before = 0
        # When it last told of a vCPU, by process and vcpu_id, and of a thread: a vCPU may change its thread, and the
        # programs are silent about a thread that they have just told of, whichever vCPU it runs.
        self._told: dict[tuple[int, int], float] = {}
        self._told_threads: dict[int, float] = {}
        self._log = RateLimitedLog()
        self._trigger: Trigger | None = None
        self._listening: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Attach it, where it is not attached; how that went is logged when it changes."""
        if self.attached or self._make is None:
            return
        before, self._trigger = self.problem, self._trigger or self._make(self._take)
        try:
            status = await self._run(self._trigger.open)
        except SourceUnavailable as err:
            self.problem = str(err)
            if self.problem != before:
                fields = {"reason": err.reason, "remedy": err.remedy}
                log.warning("notify exits are found by polling", extra={"fields": fields})
            return
        if status.attached:
            self._listen(self._trigger)
            self.attached, self._attached_at = True, asyncio.get_running_loop().time()
            self._lost_before = sum(self._trigger.lost)
        self.problem = "" if status.attached else status.reason
        if self.problem != before:
            words = {"function": status.function, "attached": str(status.attached).lower(), "reason": status.reason}
            log.info("trigger for notify exits", extra={"fields": words})

    @property
    def tells_all(self) -> bool:
        """Whether it is attached and has told, as far as is known, of every vCPU that took notify exits."""
        return self.attached and not self.missed

    @property
    def lost(self) -> int:
        """How much it could not tell of or count, for want of room, since it was attached."""
        return sum(self._trigger.lost) if self._trigger is not None and self.attached else 0

    def misses_any(self, moved: Collection[Moved]) -> bool:
        """Tell whether it has told nothing of a counter that has moved between two polls; those are counted."""
        if self._trigger is None or not self.attached:
            return False
        self._trigger.deliver()  # it tells of an exit before KVM counts it, so what it will tell of these is there
        before, self._lost_before = self._lost_before, sum(self._trigger.lost)
        missed = [vcpu for vm in moved for vcpu in self._find_untold(vm)] if self._lost_before == before else []
        self.missed += len(missed)
        self.missed_vcpus |= set(missed)
        oldest = asyncio.get_running_loop().time() - KEPT_SECONDS
        self._told = {vcpu: told for vcpu, told in self._told.items() if told >= oldest}
        self._told_threads = {tid: told for tid, told in self._told_threads.items() if told >= oldest}
        return bool(missed)

    def forget_missed(self, alive: Container[VmKey]) -> None:
        """Forget the vCPUs of VMs that have ended."""
        if any(vcpu.vm not in alive for vcpu in self.missed_vcpus):
            self.missed_vcpus = frozenset(vcpu for vcpu in self.missed_vcpus if vcpu.vm in alive)

    def _find_untold(self, moved: Moved) -> list[VcpuKey]:
        """Find the vCPUs of a VM of which it should have told, and log them."""
        if moved.before_seconds < self._attached_at:
            return []  # they may have moved before there was anybody to tell of it
        vm, oldest, never = moved.reading.vm, moved.before_seconds - AGAIN_SECONDS, float("-inf")
        untold = [
            found
            for found in moved.vcpus
            if self._told.get((vm.key.pid, found[0].vcpu_id), never) < oldest
            and self._told_threads.get(found[0].tid or 0, never) < oldest
            and found[2] > found[1]  # else somebody has set it to 0
        ]
        for vcpu, before, now in untold:
            self._log.write(logging.WARNING, _MISSED, vm=vm.id, vcpu=vcpu.index, before=before, now=now)
        return [VcpuKey(vm.key, vcpu.vcpu_id) for vcpu, _, _ in untold]

    def _listen(self, trigger: Trigger) -> None:
        asyncio.get_running_loop().add_reader(trigger.fd, self._deliver, trigger)

    def _deliver(self, trigger: Trigger) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(trigger.fd)
        self._listening = loop.call_later(GATHER_SECONDS, self._listen, trigger)
        trigger.deliver()

    def _take(self, call: NotifyCall) -> None:
        self._told[call.pid, call.vcpu_id] = self._told_threads[call.tid] = call.time_ns / NS_PER_SECOND
        self._on_call(call)

    def read_context_invalid(self) -> dict[tuple[int, int, int, int], int] | None:
        """Read exits with an invalid context by pid, start_ticks, tid, vcpu_id; None where nobody counts them."""
        if self._trigger is None or not self.attached:
            return None
        try:
            found = self._trigger.read_context_invalid()
        except OSError as err:
            self._log.write(logging.ERROR, "exits with an invalid context cannot be read", err=str(err))
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
            self._log.write(logging.ERROR, "exits with an invalid context cannot be forgotten", err=str(err))

    async def close(self) -> None:
        """Detach it."""
        if self._trigger is not None:
            if self.attached:
                asyncio.get_running_loop().remove_reader(self._trigger.fd)
            if self._listening is not None:
                self._listening.cancel()
            self.attached = False
            await self._run(self._trigger.close)
