"""All trace sessions: which are wanted, which are under way, and whether exits can be traced at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from exporter.monitor.backends import Reading, Run, Tracer
from exporter.monitor.trace_budget import Limits, TraceBudget
from exporter.monitor.trace_session import Subject, run_trace_session
from exporter.monitor.tracked_vcpu import TrackedVcpu
from exporter.stalls.verdicts import Verdict
from kvm.errors import SourceUnavailable, VmGone
from kvm.model import VcpuKey, VmKey

log = logging.getLogger(__name__)

# The tracepoint stays enabled for so long after a session: disabling and enabling it patches kernel text.
WARM_SECONDS: Final = 60.0
# Where tracing has worked before, it is soon tried again.
RETRY_SECONDS: Final = 10.0
_NEVER: Final = float("inf")


class TraceScheduler:
    """Starts sessions as the budget allows, and keeps count.

    ``is_thread`` tells whether a thread belongs to a process, ``may_run_tds`` whether a vCPU that cannot be read may be
    a TD's, ``read`` reads a vCPU (None where it cannot be had), ``read_cpu_time`` a thread's CPU time, all in worker
    threads; ``on_change`` takes verdicts.
    """

    def __init__(
        self,
        tracer: Tracer | None,
        limits: Limits,
        run: Run,
        *,
        is_thread: Callable[[int, int], bool],
        may_run_tds: Callable[[], bool],
        read: Callable[[VcpuKey], Reading | None],
        read_cpu_time: Callable[[int, int], float | None] | None,
        on_change: Callable[[TrackedVcpu, Sequence[Verdict]], None],
    ) -> None:
        self.problem = "nothing can trace exits here" if tracer is None else "not tried yet"
        self.armed = self.armings = self.records = self.lost = 0
        self.intervals: dict[int, float] = {}
        """The shortest time between two notify exits at one RIP, by the VM's window in cycles."""
        self._tracer, self._run = tracer, run
        self._budget = TraceBudget(limits)
        self._is_thread, self._read, self._on_change = is_thread, read, on_change
        self._read_cpu_time, self._may_run_tds = read_cpu_time, may_run_tds
        # Those that wait for a session, have one or had one; a VM that has ended has none here.
        self._vcpus: dict[VcpuKey, TrackedVcpu] = {}
        self._timers: dict[VcpuKey, asyncio.TimerHandle] = {}
        self._tasks: dict[VcpuKey, asyncio.Task[None]] = {}
        self._retry: asyncio.Task[None] | None = None
        self._last_ended: float | None = None
        self._closing = False

    @property
    def deferred(self) -> int:
        """How many sessions were deferred for want of budget."""
        return self._budget.deferred

    @property
    def cool_at(self) -> float:
        """When the tracepoint may be let go; infinity where it has been."""
        if self._tasks:
            return asyncio.get_running_loop().time() + WARM_SECONDS
        return _NEVER if self._last_ended is None else self._last_ended + WARM_SECONDS

    async def open(self) -> None:
        """Open the tracer, where it is not open; what is wrong is logged when it changes."""
        if self.problem:
            await self._try_tracer()

    async def _try_tracer(self) -> None:
        if self._tracer is None:
            return
        before = self.problem
        try:
            await self._run(self._tracer.open)
            self.problem = ""
        except SourceUnavailable as err:
            self.problem = str(err)
            if self.problem != before:
                text = "exits cannot be traced: stalls cannot be told from other notify exits"
                log.warning(text, extra={"fields": {"reason": err.reason, "remedy": err.remedy}})

    def consider(self, vcpu: TrackedVcpu, now: float) -> None:
        """Start a session for a vCPU if one is due and the budget allows it; else it waits."""
        if self.problem or self._closing or not vcpu.wants_session(now):
            return
        part = vcpu.quota_part
        if self._budget.is_waiting(vcpu.key, part, urgent=vcpu.urgent):
            return  # when there is room for it, ``start`` will find it: in a flood thousands wait
        self._vcpus[vcpu.key] = vcpu
        free = self._budget.want(vcpu.key, now, vcpu.least_seconds, part, urgent=vcpu.urgent)
        if free > now:
            vcpu.next_session_at = free
            self._consider_later(vcpu)
        elif not self._budget.is_full:
            self.start()

    def start(self) -> None:
        """Start the sessions that are wanted, as far as there is room."""
        now = asyncio.get_running_loop().time()
        # As long as any begin: where there is nobody to trace any more, those behind would wait for ever.
        while begun := self._budget.start(now):
            for key, seconds in begun:
                self._start_session(key, seconds)

    def _start_session(self, key: VcpuKey, seconds: float) -> None:
        loop, vcpu = asyncio.get_running_loop(), self._vcpus.get(key)
        if vcpu is None or vcpu.vcpu.tid is None or self._tracer is None or self._closing:
            self._budget.end(key, loop.time())
            return
        vcpu.begin_session()
        task = self._tasks[key] = loop.create_task(self._run_session(vcpu, vcpu.vcpu.tid, self._tracer, seconds))
        task.add_done_callback(partial(self._end, vcpu))

    def forget(self, vm: VmKey) -> None:
        """Forget a VM that has ended."""
        self._budget.forget(vm)
        self._vcpus = {key: vcpu for key, vcpu in self._vcpus.items() if key.vm != vm}
        for key in [key for key in self._timers if key.vm == vm]:
            self._timers.pop(key).cancel()
        for key, task in list(self._tasks.items()):
            if key.vm == vm:
                task.cancel()

    def drop(self, key: VcpuKey) -> None:
        """Forget a vCPU that is gone: one that comes back is another to us, and asks for itself."""
        self._budget.drop(key)
        self._vcpus.pop(key, None)
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if task := self._tasks.get(key):
            task.cancel()

    async def cool(self, now: float) -> None:
        """Let the tracepoint go if it has not been needed for a while."""
        if now >= self.cool_at and self._tracer is not None:
            self._last_ended = None
            await self._run(self._tracer.release_warm)

    async def close(self) -> None:
        """End all sessions, and give the tracer back."""
        self._closing = True
        for timer in self._timers.values():
            timer.cancel()
        tasks = [*self._tasks.values(), *([self._retry] if self._retry else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._tracer is not None:
            await self._run(self._tracer.close)

    async def _run_session(self, vcpu: TrackedVcpu, tid: int, tracer: Tracer, seconds: float) -> None:
        subject = Subject(
            tid=tid,
            detector=vcpu.detector,
            is_there=partial(self._is_thread, vcpu.key.vm.pid, tid),
            read=partial(self._read, vcpu.key),
            read_cpu_time=self._read_cpu_time and partial(self._read_cpu_time, vcpu.key.vm.pid, tid),
            on_change=partial(self._on_change, vcpu),
        )
        if obstacle := await self._run(partial(self._find_obstacle, vcpu.key)):
            self._on_change(vcpu, vcpu.detector.observe_hidden(asyncio.get_running_loop().time(), obstacle))
            return
        self.armed += 1
        self.armings += 1
        try:
            await run_trace_session(subject, tracer, self._run, seconds)
            vcpu.problem = ""
        except VmGone as err:
            log.debug("a vCPU's thread has ended", extra={"fields": {"vm": vcpu.vm.id, "err": str(err)}})
        except (SourceUnavailable, OSError) as err:
            if str(err) != vcpu.problem:
                vcpu.problem = str(err)
                fields = {"vm": vcpu.vm.id, "vcpu": vcpu.vcpu.index, "err": str(err)}
                log.warning("the exits of a vCPU cannot be traced", extra={"fields": fields})
            # Is it this thread alone? Opening tries it on ourselves, and tells if not.
            await self._try_tracer()
            if self.problem and self._retry is None:
                self._retry = asyncio.create_task(self._open_later())
        finally:
            self.armed -= 1
            self.records += subject.records
            self.lost += subject.lost
            # A trigger may be silent about it for seconds: what its session has seen is news enough for another.
            vcpu.moved |= subject.records > 0
            self._note_interval(vcpu)

    def _find_obstacle(self, key: VcpuKey) -> str:
        """Say why a vCPU must not be armed, "" where it may be; in a worker thread."""
        reading = self._read(key)
        if reading is not None and reading.untraceable is not None:
            return reading.untraceable
        return "it may be a TD, whose exits are never traced: nothing can be read of it" if self._may_run_tds() else ""

    def _end(self, vcpu: TrackedVcpu, task: asyncio.Task[None]) -> None:
        """Plan what comes after a session; every one ends here, whatever has become of it."""
        now = asyncio.get_running_loop().time()
        del self._tasks[vcpu.key]
        vcpu.in_session = False
        self._budget.end(vcpu.key, now)
        if not task.cancelled() and (err := task.exception()) is not None:
            log.error("a trace session failed", extra={"fields": {"vm": vcpu.vm.id, "err": repr(err)}})
            log.debug("a trace session failed", exc_info=err)
        self._last_ended = now
        if self._closing:
            return
        if self._vcpus.get(vcpu.key) is vcpu:
            vcpu.plan_next_session(now, self._budget.find_slot(now) if vcpu.in_rotation else now)
            self._consider_later(vcpu)
        self.start()

    def _consider_later(self, vcpu: TrackedVcpu) -> None:
        """Consider a vCPU when its next session may be; what was planned before is cancelled."""
        if vcpu.key in self._timers:
            self._timers[vcpu.key].cancel()
        self._timers[vcpu.key] = asyncio.get_running_loop().call_at(vcpu.next_session_at, self._consider_now, vcpu)

    def _consider_now(self, vcpu: TrackedVcpu) -> None:
        # A timer may go off a rounding error early.
        self.consider(vcpu, max(asyncio.get_running_loop().time(), vcpu.next_session_at))

    async def _open_later(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        self._retry = None
        await self.open()

    def _note_interval(self, vcpu: TrackedVcpu) -> None:
        shortest, window = vcpu.detector.shortest_seconds, vcpu.window_cycles
        if shortest is not None and window is not None:
            self.intervals[window] = min(shortest, self.intervals.get(window, shortest))
