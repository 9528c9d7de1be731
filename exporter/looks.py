"""All looks at vCPU threads: which are wanted, which are under way, and whether looking works at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from exporter.budget import Limits, LookBudget, VcpuKey
from exporter.followed import Followed
from exporter.look import Reading, Run, Subject, Tracer, take_look
from exporter.verdicts import Verdict
from kvm.model import SourceUnavailable, VmGone, VmKey

log = logging.getLogger(__name__)

# The tracepoint is kept in place for so long after a look: taking it out and putting it in patches kernel text.
WARM_SECONDS: Final = 60.0
_NEVER: Final = float("inf")


class Looks:
    """Starts looks as the budget allows, and keeps count.

    ``is_thread`` tells whether a thread belongs to a process, ``read`` reads a vCPU (None where it cannot be had), both
    in worker threads, ``on_change`` takes verdicts.
    """

    def __init__(
        self,
        tracer: Tracer | None,
        limits: Limits,
        run: Run,
        *,
        is_thread: Callable[[int, int], bool],
        read: Callable[[VcpuKey], Reading | None],
        on_change: Callable[[Followed, Sequence[Verdict]], None],
    ) -> None:
        self.problem = "nothing can trace exits here" if tracer is None else "not tried yet"
        self.armed = self.armings = self.records = self.lost = 0
        self.intervals: dict[int, float] = {}
        """The shortest time between two notify exits at one RIP, by the VM's window in cycles."""
        self._tracer, self._run = tracer, run
        self._budget = LookBudget(limits)
        self._is_thread, self._read, self._on_change = is_thread, read, on_change
        self._vcpus: dict[VcpuKey, Followed] = {}
        self._tasks: dict[VcpuKey, asyncio.Task[None]] = {}
        self._cool_at = _NEVER
        self._closing = False

    @property
    def exhausted(self) -> int:
        """How many looks were put off for want of budget."""
        return self._budget.exhausted

    @property
    def cool_at(self) -> float:
        """When there is nothing left of the looks but the dummy event; infinity where that is gone too."""
        return self._cool_at

    async def open(self) -> None:
        """Open the tracer, where it is not open; what is wrong is logged when it changes."""
        if self._tracer is None or not self.problem:
            return
        before = self.problem
        try:
            await self._run(self._tracer.open)
            self.problem = ""
        except SourceUnavailable as err:
            self.problem = str(err)
            if self.problem != before:
                text = "exits cannot be traced: stalls cannot be told from other notify exits"
                log.warning(text, extra={"fields": {"why": err.reason, "remedy": err.remedy}})

    def consider(self, vcpu: Followed) -> None:
        """Start a look at a vCPU if it is due and the budget allows; else it waits for its turn."""
        now = asyncio.get_running_loop().time()
        if self.problem or self._closing or not vcpu.wants_look(now):
            return
        self._vcpus[vcpu.key] = vcpu
        # Two exits in a row, and a third to tell that nothing came between them.
        seconds = 3 * (vcpu.progress.interval_seconds or 0.0)
        self._budget.want(vcpu.key, seconds, from_reserve=vcpu.may_go_on)
        self.start()

    def start(self) -> None:
        """Start the looks that are wanted, as far as the budget goes."""
        loop = asyncio.get_running_loop()
        for key, seconds in self._budget.start(loop.time()):
            vcpu = self._vcpus.pop(key, None)
            if vcpu is None or vcpu.vcpu.tid is None or self._tracer is None or self._closing:
                self._budget.end(key, loop.time())
                continue
            vcpu.moved = vcpu.may_go_on = False
            look = self._look(vcpu, vcpu.vcpu.tid, self._tracer, seconds)
            vcpu.looking = True
            task = self._tasks[key] = loop.create_task(look)
            task.add_done_callback(partial(self._end, vcpu))

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended."""
        self._budget.forget(vm)
        self._vcpus = {key: vcpu for key, vcpu in self._vcpus.items() if key.vm != vm}
        for vcpu, task in list(self._tasks.items()):
            if vcpu.vm == vm:
                task.cancel()

    async def cool(self, now: float) -> None:
        """Let the tracepoint go if it has not been needed for a while."""
        if now >= self._cool_at and not self.armed and self._tracer is not None:
            self._cool_at = _NEVER
            await self._run(self._tracer.release_warm)

    async def close(self) -> None:
        """End all looks, and give the tracer back."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._tracer is not None:
            await self._run(self._tracer.close)

    async def _look(self, vcpu: Followed, tid: int, tracer: Tracer, seconds: float) -> None:
        subject = Subject(
            tid=tid,
            progress=vcpu.progress,
            is_there=partial(self._is_thread, vcpu.key.vm.pid, tid),
            read=partial(self._read, vcpu.key),
            on_change=partial(self._on_change, vcpu),
        )
        self.armed += 1
        self.armings += 1
        try:
            await take_look(subject, tracer, self._run, seconds)
        except VmGone as err:
            log.debug("a vCPU's thread has ended", extra={"fields": {"vm": vcpu.vm.id, "why": str(err)}})
        except (SourceUnavailable, OSError) as err:
            if str(err) != vcpu.problem:
                vcpu.problem = str(err)
                fields = {"vm": vcpu.vm.id, "vcpu": vcpu.vcpu.index, "why": str(err)}
                log.warning("the exits of a vCPU cannot be traced", extra={"fields": fields})
            # Is it this thread alone? Opening tries it on ourselves, and tells if not.
            self.problem = "being tried again"
            await self.open()
        finally:
            self.armed -= 1
            self.records += subject.records
            self.lost += subject.lost
            self._note_interval(vcpu)

    def _end(self, vcpu: Followed, task: asyncio.Task[None]) -> None:
        """Plan what comes after a look; every look ends here, whatever has become of it."""
        loop = asyncio.get_running_loop()
        del self._tasks[vcpu.key]
        vcpu.looking = False
        self._budget.end(vcpu.key, loop.time())
        if not task.cancelled() and (err := task.exception()) is not None:
            log.error("looking at a vCPU failed", extra={"fields": {"vm": vcpu.vm.id, "why": repr(err)}})
            log.debug("looking at a vCPU failed", exc_info=err)
        self._cool_at = loop.time() + WARM_SECONDS
        if not self._closing and not task.cancelled():
            loop.call_at(vcpu.plan_look(loop.time()), self.consider, vcpu)
            self.start()

    def _note_interval(self, vcpu: Followed) -> None:
        shortest, window = vcpu.progress.shortest_seconds, vcpu.window_cycles
        if shortest is not None and window is not None:
            self.intervals[window] = min(shortest, self.intervals.get(window, shortest))
