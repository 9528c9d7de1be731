"""When to look closer: what tells of notify exits, and what becomes of what is found.

Three ways lead here, and none costs a guest anything while nothing happens:

- the **trigger**, BPF programs at handle_notify(), tells of each vCPU that takes a notify exit, a few times a second;
- where it cannot be attached, counters are **polled**, but only while there are VMs whose counter can move;
- vCPUs that were seen to take notify exits are **followed**: their counters and registers are read each second, until
  they are quiet.

A perf kprobe on handle_notify() in each vCPU's thread would be a trigger without BPF. It is not used: it needs an event
held open for every vCPU of the host, all the time, for what a poll does.

Everything here runs in the event loop and waits for nothing; what waits runs in worker threads of the watch's own, so
that a scrape cannot delay a verdict. ``report`` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from exporter.history.changes import CounterChanges
from exporter.monitor.attempts import Attempts
from exporter.monitor.backends import Backends, PollMode, Reading, Run
from exporter.monitor.polling import IDLE_SECONDS, RETRY_SECONDS, Polling, PollTimes, choose_polling
from exporter.monitor.process_watcher import ProcessWatcher
from exporter.monitor.thread_index import Found, ThreadIndex
from exporter.monitor.trace_budget import Limits
from exporter.monitor.trace_scheduler import TraceScheduler
from exporter.monitor.tracked_vcpu import TrackedVcpu, build_report
from exporter.monitor.trigger import ManagedTrigger
from exporter.monitor.vcpu_reader import VcpuReader
from exporter.stalls.detector import StallDetector
from exporter.stalls.drill import DRILL_SECONDS, Drill, NoDrill, find_vm
from exporter.stalls.stall_log import StallLog
from exporter.stalls.verdicts import MonitorReport, StallRule, State, VcpuReport, Verdict
from kvm.bpf.notify_trigger import NotifyCall
from kvm.model import Vcpu, VcpuKey, VmKey, VmReading

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLLOW_SECONDS: Final = 1.0
# More than this are read with the whole host at once.
FOLLOWED_SINGLY: Final = 32
# Reading the whole host each second for a few vCPUs is too much with more vCPUs than this.
FOLLOWED_VCPUS: Final = 4000
# A VM or a vCPU that is missing from a look may be back in the next.
MISSING_SECONDS: Final = 60.0
WORKERS: Final = 4
_NEVER: Final = float("inf")


class StallMonitor:
    """Watches a host's vCPUs for stalls: ``run`` does it, ``report`` tells of it."""

    def __init__(
        self,
        means: Backends,
        *,
        rule: StallRule,
        poll: PollMode = PollMode.AUTO,
        limits: Limits | None = None,
        unix: Callable[[], float] = time.time,
        run: Run | None = None,
    ) -> None:
        """``run`` runs what waits for the kernel; by default in worker threads of the watch's own."""
        self._means, self._rule, self._poll_mode, self._unix, self._run_given = means, rule, poll, unix, run
        self._clock: Callable[[], float] = time.monotonic
        self._workers: ThreadPoolExecutor | None = None
        self._single = VcpuReader(means.read_vcpu)
        self._looks = TraceScheduler(
            means.tracer,
            limits or Limits(),
            self._call,
            is_thread=means.is_thread,
            read=self._single.read,
            on_change=self._take,
        )
        self._holds = ProcessWatcher(means.hold, self._call, self._end_process)
        self._stall_log = StallLog()
        self._counters = CounterChanges()
        self._threads = ThreadIndex()
        self._readings: dict[VmKey, VmReading] = {}
        self._vcpu_count = 0
        self._followed: dict[VcpuKey, TrackedVcpu] = {}
        self._active: dict[VcpuKey, TrackedVcpu] = {}
        self._missing: dict[VcpuKey, float] = {}
        self._ended: set[tuple[int, ...]] = set()
        self._trigger = ManagedTrigger(means.make_trigger, self._call, self.take_call)
        self._polls = PollTimes()
        self._unread = False
        self._read_at = self._retry_at = -_NEVER
        self._attempts = Attempts()
        self._wake = asyncio.Event()
        self._drill: Drill | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until ``stop`` is set, then give everything back."""
        self._clock = asyncio.get_running_loop().time
        if self._run_given is None:
            self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="watch")
        stopping = asyncio.ensure_future(stop.wait())
        stopping.add_done_callback(lambda _: self._wake.set())
        try:
            while not stop.is_set():
                self._wake.clear()
                await self._keep_up()
                await self._rest()
        finally:
            stopping.cancel()
            await self._close()

    def report(self) -> MonitorReport:
        """Return what is known now; from any thread."""
        looks, drill = self._looks, self._drill
        followed = [self._report(vcpu) for vcpu in list(self._followed.values())]
        return MonitorReport(
            vcpus=(*followed, *([drill.report()] if drill else [])),
            problem=looks.problem,
            trigger_problem=self._trigger.problem,
            trigger="bpf" if self._trigger.attached else "poll" if self._polls.polling.period_seconds else "",
            poll_period_seconds=self._polls.polling.period_seconds,
            traced_vcpus=looks.armed,
            armings=looks.armings,
            records=looks.records,
            lost_records=looks.lost + self._trigger.lost + self._threads.lost,
            budget_exhausted=looks.exhausted,
            warnings=self._stall_log.warnings,
            warnings_suppressed=self._stall_log.suppressed,
            interval_min_seconds=dict(looks.intervals),
            context_invalid=self._trigger.read_context_invalid(),
        )

    async def start_drill(self, name: str) -> VcpuReport:
        """Begin a drill with a VM, by its id or its name; raises NoDrill."""
        snapshot = await self._call(self._means.reader.read)
        if self._drill is not None:  # perhaps only since we wait
            raise NoDrill(f"a drill is under way; it ends within {DRILL_SECONDS:.0f} s")
        now = self._clock()
        self._drill = Drill(find_vm(snapshot, name), self._rule, now)
        for report in self._drill.begin(now):
            self._stall_log.tell(report, now, self._unix())
        self._wake.set()
        return self._drill.report()

    def take_call(self, call: NotifyCall) -> None:
        """Take in what the trigger tells of; a thread that is not known is looked for."""
        found = self._threads.find(call)
        if found is not None:
            self._take_exit(found)
        elif self._threads.deferred_reason(call, self._clock()):
            self._polls.wanted = True
            self._wake.set()

    async def _keep_up(self) -> None:
        """Do what is due; what goes wrong costs its own part only, and never ends the watch."""
        if self._clock() >= self._retry_at:
            self._retry_at = self._clock() + RETRY_SECONDS
            self._single.try_again()
            await self._attempts.take(self._looks.open)
            await self._attempts.take(self._trigger.open)
        if self._clock() >= self._find_poll_time():
            await self._attempts.take(self._poll)
        elif self._reads_singly and self._clock() >= self._read_at + FOLLOW_SECONDS:
            await self._attempts.take(self._read_singly)
        await self._attempts.take(self._settle)

    async def _rest(self) -> None:
        """Wait until something is due or somebody wakes us."""
        now = self._clock()
        due = [self._find_poll_time(), self._looks.cool_at]
        if self._looks.problem or self._single.left_out or not self._trigger.attached:
            due.append(self._retry_at)
        if self._reads_singly:
            due.append(self._read_at + FOLLOW_SECONDS)
        if self._stall_log.busy:
            due.append(now + FOLLOW_SECONDS)
        if self._drill is not None:
            due.append(self._drill.ends_at)
        due += [since + MISSING_SECONDS for since in self._missing.values()]
        try:
            async with asyncio.timeout_at(None if min(due) == _NEVER else max(min(due), now + 0.001)):
                await self._wake.wait()
        except TimeoutError:
            return  # that is what was wanted

    @property
    def _reads_singly(self) -> bool:
        """Whether vCPUs are followed one by one, and not with the whole host."""
        return 0 < len(self._active) <= FOLLOWED_SINGLY and not self._single.left_out

    def _find_poll_time(self) -> float:
        """Return when the next look at the host is due."""
        at_most = _NEVER
        if self._active and (self._unread or not self._reads_singly):
            at_most = FOLLOW_SECONDS * max(1.0, self._vcpu_count / FOLLOWED_VCPUS)
        elif self._missing:
            at_most = IDLE_SECONDS
        return self._polls.find_next(at_most)

    async def _poll(self) -> None:
        """Look at the whole host."""
        self._unread = False
        began = self._read_at = self._clock()
        self._polls.begin(began)
        snapshot = await self._call(self._means.reader.read)
        ended = self._read_at = self._clock()
        self._readings = {reading.vm.key: reading for reading in snapshot.readings}
        self._vcpu_count = sum(len(reading.vcpus) for reading in snapshot.readings)
        always = self._poll_mode is PollMode.ALWAYS
        self._polls.polling = Polling(_NEVER, 0.0) if self._trigger.attached else choose_polling(snapshot, always)
        for moved in self._counters.observe(snapshot):
            if VcpuKey(moved.reading.vm.key, moved.vcpu.vcpu_id) not in self._followed:
                vcpu = self._follow(moved.reading, moved.vcpu)
                vcpu.progress.observe_counter(moved.before_seconds, moved.before_seconds, moved.before)
        for vcpu in list(self._followed.values()):
            self._renew(vcpu, began, ended)
        for found in self._threads.observe(snapshot, ended):
            self._take_exit(found)
        self._polls.end(ended)

    def _renew(self, vcpu: TrackedVcpu, began: float, ended: float) -> None:
        """Take in what a look at the host says of a vCPU, or that it says nothing."""
        reading = self._readings.get(vcpu.key.vm)
        counts = None if reading is None else vcpu.renew(reading)
        # A VM that cannot be read shows none of its vCPUs.
        if reading is None or (reading.vcpus and vcpu.key.vcpu_id not in [found.vcpu_id for found in reading.vcpus]):
            self._missing.setdefault(vcpu.key, ended)
        else:
            self._missing.pop(vcpu.key, None)
        if counts is None:
            self._take(vcpu, vcpu.progress.observe_unread(ended))
        else:
            self._take_counts(vcpu, began, ended, *counts)

    async def _read_singly(self) -> None:
        """Read the active vCPUs one by one; whoever cannot be read is looked for in a look at the host."""
        active, clock = list(self._active.values()), self._clock
        self._read_at = clock()

        def read() -> list[tuple[TrackedVcpu, float, Reading | None, float]]:
            return [(vcpu, clock(), self._single.read(vcpu.key), clock()) for vcpu in active]

        for vcpu, began, reading, ended in await self._call(read):
            if vcpu.key not in self._followed:
                continue
            if reading is None:
                self._unread = True
            else:
                self._take(vcpu, vcpu.progress.observe_registers(began, ended, reading.registers, reading.nested))
                self._take_counts(vcpu, began, ended, reading.notify_exits, reading.exits)
        self._read_at = self._clock()

    async def _settle(self) -> None:
        """Do what takes no reading: tell what has waited, and forget what has ended."""
        now = self._clock()
        for key in [key for key, since in self._missing.items() if now - since >= MISSING_SECONDS]:
            if key.vm not in self._readings:
                self._forget(key.vm)
            elif key in self._followed:
                self._drop(key)
                self._stall_log.tell_unplugged(*key, now)
        if self._polls.failing:
            for vcpu in list(self._active.values()):
                self._take(vcpu, vcpu.progress.observe_unread(now))
        self._end_drill(now)
        self._stall_log.flush(now, self._unix())
        await self._looks.cool(now)
        ended, self._ended = self._ended, set()
        await self._trigger.forget(ended)

    def _take_exit(self, found: Found) -> None:
        """Take in that a vCPU has just taken a notify exit."""
        vcpu = self._follow(found.reading, found.vcpu)
        self._take(vcpu, vcpu.progress.observe_trigger(self._clock()))
        vcpu.moved = True
        self._looks.consider(vcpu)

    def _take_counts(self, vcpu: TrackedVcpu, began: float, ended: float, notify_exits: int, exits: int | None) -> None:
        self._take(vcpu, vcpu.progress.observe_counter(began, ended, notify_exits))
        vcpu.see_counts(began, ended, notify_exits, exits)
        self._looks.consider(vcpu)

    def _follow(self, reading: VmReading, vcpu: Vcpu) -> TrackedVcpu:
        key = VcpuKey(reading.vm.key, vcpu.vcpu_id)
        found = self._followed.get(key)
        if found is None:
            found = TrackedVcpu(key, reading.vm, vcpu, reading.source, StallDetector(self._rule, self._clock()))
            found.renew(reading)
            self._followed[key] = found
            self._holds.hold(key.vm)
        return found

    def _end_process(self, key: VmKey) -> None:
        """Take in that a VM's process has ended, with all its VMs."""
        self._ended.add(key[:2])
        self._forget(key)

    def _forget(self, key: VmKey) -> None:
        """Forget a VM that is gone: nothing of ours outlives it."""
        self._holds.release(key)
        self._looks.forget(key)
        for vcpu in [vcpu for vcpu in self._followed if vcpu.vm == key]:
            self._drop(vcpu)
        self._stall_log.tell_end(key, self._clock())
        self._wake.set()

    def _drop(self, key: VcpuKey) -> None:
        """Follow a vCPU no more; its process may have other VMs, so only its own thread's counts go."""
        vcpu = self._followed.pop(key)
        self._active.pop(key, None)
        self._missing.pop(key, None)
        if vcpu.vcpu.tid is not None:
            self._ended.add((*key.vm[:2], vcpu.vcpu.tid, key.vcpu_id))

    def _take(self, vcpu: TrackedVcpu, changes: Sequence[Verdict]) -> None:
        """Take in what has been found out about a vCPU."""
        now = self._clock()
        for verdict in changes:
            if verdict.state is State.SUSPECT:
                self._polls.wanted = True  # so that, if it comes to that, the VM is called by its newest name
            if verdict.state is State.QUIET:
                self._active.pop(vcpu.key, None)
            else:
                self._active[vcpu.key] = vcpu
            fields = {"vm": vcpu.vm.id, "vcpu": vcpu.vcpu.index, "state": verdict.state, "reason": verdict.reason}
            fields["seconds_after"] = f"{now - verdict.since_seconds:.4f}"  # how late we are to know it
            log.debug("verdict", extra={"fields": fields})
            self._stall_log.tell(self._report(vcpu, verdict), now, self._unix())
        if changes:
            self._wake.set()

    def _report(self, vcpu: TrackedVcpu, verdict: Verdict | None = None) -> VcpuReport:
        return build_report(vcpu, verdict, self._looks.problem, self._clock())

    def _end_drill(self, now: float) -> None:
        if self._drill is not None and now >= self._drill.ends_at:
            drill, self._drill = self._drill, None
            for report in drill.end(now):
                self._stall_log.tell(report, now, self._unix())

    async def _call(self, call: Callable[[], T]) -> T:
        """Run what waits for the kernel."""
        if self._run_given is not None:
            return await self._run_given(call)
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def _close(self) -> None:
        await self._looks.close()
        await self._holds.close()
        await self._trigger.close()
        if self._workers is not None:
            self._workers.shutdown(wait=True)
