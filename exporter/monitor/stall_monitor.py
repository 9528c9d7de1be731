"""The engine: what tells of notify exits, and what becomes of each vCPU that takes them.

Three ways lead here, and none costs a guest anything while nothing happens:

- the **trigger**, BPF programs at handle_notify(), reports each vCPU that takes a notify exit, at once and then seldom;
- counters are **polled**, but only while there are VMs whose counter can move, and slowly while a trigger is attached
  that has told of all that they have counted;
- vCPUs that were seen to take notify exits are **tracked**: their counters and registers are read each second, until
  they are quiet.

Where KVM itself tells where notify exits are (``kvm/patches``) those readings give the verdicts, and nothing is traced
but a vCPU of which they cannot tell.

A perf kprobe on handle_notify() in each vCPU's thread would be a trigger without BPF. It is not used: it needs an event
held open for every vCPU of the host, all the time, for what a poll does.

Everything here runs in the event loop and waits for nothing; what waits runs in worker threads of the monitor's own, so
that a scrape cannot delay a verdict. ``report`` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from exporter.logs.rate_limit import RateLimitedLog
from exporter.monitor.agent_usage import USAGE_SECONDS
from exporter.monitor.attempts import Attempts
from exporter.monitor.backends import Backends, PollMode, Reading, Run
from exporter.monitor.context_losses import ContextLosses, Thread
from exporter.monitor.cpu_time import bound_failures, observe_cpu_times
from exporter.monitor.drills import Drills
from exporter.monitor.figure_columns import build_vm_figures
from exporter.monitor.instructions import Instructions
from exporter.monitor.polling import IDLE_SECONDS, RETRY_SECONDS, Poller
from exporter.monitor.process_watcher import ProcessWatcher
from exporter.monitor.read_plan import choose_due, find_next
from exporter.monitor.thread_index import Found, ThreadIndex
from exporter.monitor.trace_budget import Limits
from exporter.monitor.trace_scheduler import TraceScheduler
from exporter.monitor.tracked_vcpu import TrackedVcpu, build_report, find_window
from exporter.monitor.tracked_vcpus import TrackedVcpus
from exporter.monitor.trigger import ManagedTrigger
from exporter.monitor.vcpu_reader import VcpuReader
from exporter.monitor.workers import Workers
from exporter.stalls.detector import StallDetector
from exporter.stalls.stall_log import StallLog
from exporter.stalls.verdicts import (
    AgentUsage,
    Evidence,
    MonitorReport,
    StallRule,
    State,
    VcpuFigures,
    VcpuReport,
    Verdict,
    VmFigures,
)
from kvm.bpf.notify_trigger import NotifyCall
from kvm.model import Vcpu, VcpuKey, VmKey, VmReading

log = logging.getLogger(__name__)

TRACK_SECONDS: Final = 1.0
# With all vCPUs of a host notifying, calls come by the thousand a second, and whoever waits for a trace session goes on
# waiting. But that is sooner than a trigger tells of the same vCPU again.
RECONSIDER_SECONDS: Final = 4.0
# More active vCPUs than this are read with the whole host at once.
SINGLE_READS: Final = 32
# With more vCPUs than this, reading the whole host each second for a few of them is too much.
SNAPSHOT_VCPUS: Final = 4000
# But whoever has just begun to take notify exits is read twice as soon: that tells which of them do little else.
NEWS_SECONDS: Final = 2.5
_NEVER: Final = float("inf")


class StallMonitor:
    """Finds stalls among a host's vCPUs: ``run`` does it, ``report`` tells what it has found."""

    def __init__(
        self,
        backends: Backends,
        *,
        rule: StallRule,
        poll: PollMode = PollMode.AUTO,
        limits: Limits | None = None,
        unix: Callable[[], float] = time.time,
        run: Run | None = None,
    ) -> None:
        """``run`` runs what waits for the kernel; by default in worker threads of the monitor's own."""
        self._reader, self._rule, self._unix = backends.reader, rule, unix
        self._read_cpu_time = backends.read_cpu_time and bound_failures(backends.read_cpu_time)
        self._read_usage = backends.read_agent_usage
        self._usage_at = -_NEVER if self._read_usage else _NEVER
        self._usage: AgentUsage | None = None
        self._clock: Callable[[], float] = time.monotonic
        self._workers: Workers | None = None
        if run is None:
            run = self._workers = Workers()
        self._run = run
        self._single = VcpuReader(backends.read_vcpu, backends.rip_sources)
        self._traces = False
        """Whether anything needs the tracer: all but a KVM that tells where notify exits are."""
        self._poller = Poller(backends.reader, poll, self._run)
        self._scheduler = TraceScheduler(
            backends.tracer,
            limits or Limits(),
            self._run,
            is_thread=backends.is_thread,
            may_run_tds=backends.may_run_tds,
            read=self._single.read,
            read_cpu_time=self._read_cpu_time,
            on_change=self._take,
        )
        self._processes = ProcessWatcher(backends.open_pidfd, self._run, self._end_process)
        self._trigger = ManagedTrigger(backends.make_trigger, self._run, self.take_call)
        self._threads = ThreadIndex()
        # By process, thread and vcpu_id: the vCPUs that the trigger has told of since the newest snapshot.
        self._heard: dict[tuple[int, ...], TrackedVcpu] = {}
        self._losses = ContextLosses()
        self._rate_limited_log = RateLimitedLog()
        self._tracked = TrackedVcpus()
        self._stall_log = StallLog()
        self._attempts = Attempts()
        # Processes and threads whose counts the trigger is still to forget.
        self._ended: set[tuple[int, ...]] = set()
        self.busy_since: float | None = None
        """Since when what is due has been done, by the event loop's clock; None while nothing is due."""
        self._news_until = -_NEVER
        self._some_unread = False
        self._kvm_changes: int | None = None
        self._read_at = self._retry_at = -_NEVER
        self._wake = asyncio.Event()
        self._instructions = Instructions(backends.read_instruction, self._run, self._wake.set)
        self._drills = Drills(rule, self._tell)

    async def run(self, stop: asyncio.Event) -> None:
        """Monitor until ``stop`` is set, then give everything back."""
        self._clock = asyncio.get_running_loop().time
        stopping = asyncio.ensure_future(stop.wait())
        stopping.add_done_callback(lambda _: self._wake.set())
        try:
            while not stop.is_set():
                self._wake.clear()
                self.busy_since = self._clock()
                await self._keep_up()
                self.busy_since = None
                await self._rest()
        finally:
            stopping.cancel()
            await self._close()

    def report(self, *, with_verdicts: bool = True) -> MonitorReport:
        """Return what is known now; from any thread. Without verdicts it costs little, however many vCPUs there are."""
        scheduler, period = self._scheduler, self._poller.period_seconds
        tells_rips = self._single.tells_rips
        return MonitorReport(
            vcpus=(*map(self._report, self._tracked if with_verdicts else ()), *self._drills.report()),
            figures=self._find_figures(),
            problem="" if tells_rips else scheduler.problem,
            evidence=Evidence.KERNEL if tells_rips else Evidence.TRACE,
            trigger_problem=self._trigger.problem,
            trigger_missed=self._trigger.missed,
            missed_vcpus=self._trigger.missed_vcpus,
            trigger="bpf" if self._trigger.attached else "poll" if period else "",
            poll_period_seconds=period,
            traced_vcpus=scheduler.armed,
            armings=scheduler.armings,
            records=scheduler.records,
            lost_records=scheduler.lost + self._trigger.lost + self._threads.lost,
            budget_exhausted=scheduler.deferred,
            warnings=self._stall_log.warnings,
            warnings_suppressed=self._stall_log.suppressed,
            interval_min_seconds=dict(scheduler.intervals),
            context_invalid=self._trigger.read_context_invalid(),
            agent_usage=self._usage,
        )

    async def start_drill(self, name: str) -> VcpuReport:
        """Begin a drill with a VM, by its id or its name; raises NoDrill."""
        snapshot = await self._run(self._reader.read)
        report = self._drills.start(snapshot, name, self._clock())
        self._wake.set()
        return report

    def take_call(self, call: NotifyCall) -> None:
        """Take in what the trigger reports; a thread that is not known waits for the next snapshot."""
        vcpu = self._heard.get(call[1:])
        if vcpu is None and (found := self._threads.find(call)) is not None:
            vcpu = self._heard[call[1:]] = self._track(found.reading, found.vcpu)
        if vcpu is not None:
            self._take_exit(vcpu)
        elif self._threads.defer(call, self._clock()):
            self._poller.wanted = True
            self._wake.set()

    async def _keep_up(self) -> None:
        """Do what is due; what goes wrong costs its own part only, and never ends the monitor."""
        if self._clock() >= self._retry_at:
            self._retry_at = self._clock() + RETRY_SECONDS
            self._single.try_again()
            self._traces = False
            await self._attempts.take(self._trigger.open)
        if self._clock() >= self._find_poll_time():
            await self._attempts.take(self._poll)
        elif self._clock() >= self._find_read_time():
            await self._attempts.take(self._read_singly)
        if not self._traces and self._wants_traces:  # a poll has told whether KVM does without
            self._traces = True
            if not self._single.tells_rips:
                self._instructions.tell_that_there_are_none()
            await self._attempts.take(self._scheduler.open)
        self._instructions.start(self._tracked.active.values(), self._clock())
        await self._attempts.take(self._settle)
        if self._clock() >= self._usage_at:
            await self._attempts.take(self._read_agent_usage)

    async def _rest(self) -> None:
        """Wait until something is due or somebody wakes us."""
        now = self._clock()
        due = [self._find_poll_time(), self._scheduler.cool_at, self._tracked.gone_at, self._drills.ends_at]
        if (self._scheduler.problem and self._traces) or self._single.left_out or not self._trigger.attached:
            due.append(self._retry_at)
        due += [self._usage_at, self._find_read_time()]
        if self._stall_log.busy or self._losses.waiting:
            due.append(now + TRACK_SECONDS)
        try:
            async with asyncio.timeout_at(None if min(due) == _NEVER else max(min(due), now + 0.001)):
                await self._wake.wait()
        except TimeoutError:
            return  # deadline reached: normal

    @property
    def _reads_singly(self) -> bool:
        """Whether active vCPUs are read one by one, and not with the whole host."""
        is_few = len(self._tracked.active) <= SINGLE_READS or self._single.tells_rips
        return bool(self._tracked.active) and is_few and not self._single.left_out

    @property
    def _wants_traces(self) -> bool:
        """Whether there is something that only a trace can tell."""
        return not self._single.tells_rips or not all(map(self._is_told, self._tracked.active.values()))

    def _is_told(self, vcpu: TrackedVcpu) -> bool:
        """Whether KVM itself tells where a vCPU is."""
        return self._single.tells_rips_of(vcpu.source) and not vcpu.needs_trace

    def _find_read_time(self) -> float:
        """Return when vCPUs are next to be read one by one."""
        if not self._reads_singly:
            return _NEVER
        if self._single.tells_rips:
            return find_next(self._tracked.active.values(), self._clock())
        return self._read_at + TRACK_SECONDS

    def _find_poll_time(self) -> float:
        """Return when the next poll is due."""
        at_most = _NEVER
        if self._tracked.active and (self._some_unread or not self._reads_singly):
            seldom = max(1.0, self._poller.vcpu_count / SNAPSHOT_VCPUS)
            at_most = TRACK_SECONDS * (1.0 if self._clock() < self._news_until else seldom)
        elif self._tracked.any_missing:
            at_most = IDLE_SECONDS
        return self._poller.find_next(at_most)

    async def _poll(self) -> None:
        """Read the whole host, and take in what that says of each tracked vCPU."""
        self._some_unread = False
        self._read_at = self._clock()
        await self._read_cpu_times()
        poll = await self._poller.poll(self._trigger.tells_all)
        self._read_at = poll.ended
        if self._kvm_changes not in (None, poll.snapshot.kvm_changes):
            self._retry_at = self._read_at  # what there was nothing of before can be had now
        self._kvm_changes = poll.snapshot.kvm_changes
        self._poller.wanted |= self._trigger.misses_any(poll.moved)  # from now on as without it
        self._trigger.forget_missed(self._poller.readings)
        for reading, seconds, vcpus in poll.moved:
            known = self._tracked.of_vm(reading.vm.key)
            for moved, before, _ in [found for found in vcpus if found[0].vcpu_id not in known]:
                self._track(reading, moved).detector.observe_counter(seconds, seconds, before)
        for vcpu, counts in self._tracked.renew(self._poller.readings, poll.ended):
            if counts is None:
                self._take(vcpu, vcpu.detector.observe_unread(poll.ended))
            else:
                self._take_counts(vcpu, poll.began, poll.ended, *counts)
        waited = self._threads.observe(poll.snapshot, poll.ended)
        if not self._threads.is_same:  # else a flood would have ten thousand found anew after each poll
            self._heard.clear()
        for found in waited:
            self._take_exit(self._track(found.reading, found.vcpu))

    async def _read_singly(self) -> None:
        """Read the active vCPUs one by one; those that cannot be read are looked up with the whole host."""
        await self._read_cpu_times()
        active, clock = list(self._tracked.active.values()), self._clock
        if self._single.tells_rips:
            active = choose_due(active, clock())
        self._read_at = clock()
        for vcpu in active:  # also where reading fails: what is due at once for ever would be tried without end
            vcpu.read_at = self._read_at

        def read() -> list[tuple[TrackedVcpu, float, Reading | None, float]]:
            return [(vcpu, clock(), self._single.read(vcpu.key), clock()) for vcpu in active]

        for vcpu, began, reading, ended in await self._run(read):
            if self._tracked.get(vcpu.key) is None:
                continue
            vcpu.read_at = began
            if reading is None:
                self._some_unread = True
            else:
                if reading.kernel is not None and not vcpu.in_session:
                    vcpu.has_registers = bool(reading.registers)
                    self._take(vcpu, vcpu.detector.observe_kernel(began, ended, reading.kernel, vcpu.has_registers))
                self._take(vcpu, vcpu.detector.observe_registers(began, ended, reading.registers, reading.nested))
                self._take_counts(vcpu, began, ended, reading.notify_exits, reading.exits)
        self._read_at = self._clock()

    async def _read_cpu_times(self) -> None:
        """Read the CPU time of suspected vCPUs' threads, before their counters: it says what a still counter means."""
        if self._read_cpu_time is not None:
            suspected = [vcpu for vcpu in self._tracked.active.values() if vcpu.detector.suspected][:SINGLE_READS]
            await observe_cpu_times(suspected, self._read_cpu_time, self._run, self._clock)

    async def _read_agent_usage(self) -> None:
        self._usage_at = self._clock() + USAGE_SECONDS
        if self._read_usage is not None:
            try:
                self._usage = await self._run(self._read_usage)
            except Exception:
                self._usage = None  # what cannot be read is not what it was
                raise

    async def _settle(self) -> None:
        """Do what takes no reading: report what has waited, and forget what has ended."""
        now = self._clock()
        for key in self._tracked.list_gone(now):
            if key.vm not in self._poller.readings:
                self._forget(key.vm)
            elif self._tracked.get(key) is not None:
                self._drop(key)
                self._stall_log.tell_unplugged(*key, now)
        if self._poller.failing:
            for vcpu in list(self._tracked.active.values()):
                self._take(vcpu, vcpu.detector.observe_unread(now))
        self._take_context_losses(now)
        self._drills.end_if_due(now)
        self._stall_log.flush(now, self._unix())
        await self._scheduler.cool(now)
        ended, self._ended = self._ended, set()
        await self._trigger.forget(ended)
        self._tracked.renew_figures()

    def _take_exit(self, vcpu: TrackedVcpu) -> None:
        """Take in that a vCPU has just taken a notify exit."""
        now = self._clock()
        if changes := vcpu.detector.observe_trigger(now):
            self._take(vcpu, changes)
        if not vcpu.moved or changes or now - vcpu.considered_at >= RECONSIDER_SECONDS:
            vcpu.moved = True
            self._consider(vcpu)

    def _take_counts(self, vcpu: TrackedVcpu, began: float, ended: float, notify_exits: int, exits: int | None) -> None:
        is_one_of_few = len(self._tracked.active) <= SINGLE_READS
        is_due = is_one_of_few or ended - vcpu.considered_at >= RECONSIDER_SECONDS
        if changes := vcpu.detector.observe_counter(began, ended, notify_exits):
            self._take(vcpu, changes)
            is_due = True
        if exits is not None and (changes := vcpu.detector.observe_exits(ended, exits)):
            self._take(vcpu, changes)
            is_due = True
        if vcpu.see_counts(began, ended, notify_exits, exits) or is_due:
            self._consider(vcpu)

    def _consider(self, vcpu: TrackedVcpu) -> None:
        """Have a vCPU traced if that is due, and if KVM itself does not tell enough."""
        now = vcpu.considered_at = self._clock()
        vcpu.told_by_kernel = self._is_told(vcpu)
        self._scheduler.consider(vcpu, now)

    def _take_context_losses(self, now: float) -> None:
        """Take in which vCPUs have taken an exit with an invalid context; that cannot wait for a trace."""

        def find(thread: Thread) -> Found | None:
            pid, _, tid, vcpu_id = thread
            return self._threads.find(NotifyCall(0, pid, tid, vcpu_id))

        counts = self._trigger.read_context_invalid()
        if counts is None:
            return
        placed, unplaced = self._losses.take(counts, find, now)
        for found in placed:
            vcpu = self._track(found.reading, found.vcpu)
            self._take(vcpu, vcpu.detector.observe_context_invalid(now))
        for pid, _, tid, vcpu_id in unplaced:
            text = "the CPU has lost the state of a vCPU whose VM is not known"
            self._rate_limited_log.write(logging.WARNING, text, pid=pid, tid=tid, vcpu_id=vcpu_id)
        self._poller.wanted |= self._losses.waiting

    def _take(self, vcpu: TrackedVcpu, changes: Sequence[Verdict]) -> None:
        """Take in what has been found out about a vCPU."""
        if not changes:  # nearly always, and a flood of exits comes by the thousand a second
            return
        now = self._clock()
        for verdict in changes:
            if verdict.state is State.SUSPECT:
                self._poller.wanted = True  # so that, if it comes to a warning, the VM has its newest name
            if verdict.state is State.NOTIFYING:
                self._news_until = now + NEWS_SECONDS
            if verdict.state is State.QUIET:
                self._tracked.active.pop(vcpu.key, None)
            else:
                self._tracked.active[vcpu.key] = vcpu
            if log.isEnabledFor(logging.DEBUG):
                fields = {"vm": vcpu.vm.id, "vcpu": vcpu.vcpu.index, "state": verdict.state, "reason": verdict.reason}
                fields["seconds_after"] = f"{now - verdict.since_seconds:.4f}"  # how late we are to know it
                log.debug("verdict", extra={"fields": fields})
            if self._stall_log.concerns(vcpu.key, verdict.state):
                self._tell(self._report(vcpu, verdict), now)
        self._wake.set()

    def _track(self, reading: VmReading, vcpu: Vcpu) -> TrackedVcpu:
        key = VcpuKey(reading.vm.key, vcpu.vcpu_id)
        tracked = self._tracked.get(key)
        if tracked is None:
            detector, window = StallDetector(self._rule, self._clock()), find_window(reading)
            tracked = TrackedVcpu(key, reading.vm, vcpu, reading.source, detector, window)
            self._tracked.add(tracked)
            self._processes.watch(key.vm)
        return tracked

    def _end_process(self, key: VmKey) -> None:
        """Take in that a VM's process has ended, with all its VMs."""
        self._ended.add(key[:2])
        self._forget(key)

    def _forget(self, key: VmKey) -> None:
        """Forget a VM that is gone: nothing of ours outlives it."""
        self._processes.release(key)
        self._scheduler.forget(key)
        self._instructions.forget(key)
        self._heard.clear()
        for vcpu in self._tracked.drop_vm(key):
            self._note_ended(vcpu)
        self._stall_log.tell_end(key, self._clock())
        self._wake.set()

    def _drop(self, key: VcpuKey) -> None:
        vcpu = self._tracked.drop(key)
        self._scheduler.drop(key)
        self._heard.clear()
        if vcpu is not None:
            self._note_ended(vcpu)

    def _note_ended(self, vcpu: TrackedVcpu) -> None:
        """Have the trigger forget a vCPU's own thread; its process may have other VMs."""
        if vcpu.vcpu.tid is not None:
            self._ended.add((*vcpu.key.vm[:2], vcpu.vcpu.tid, vcpu.key.vcpu_id))

    def _report(self, vcpu: TrackedVcpu, verdict: Verdict | None = None) -> VcpuReport:
        return build_report(vcpu, verdict, self._find_problem(vcpu), self._clock())

    def _find_figures(self) -> dict[VmKey, VmFigures]:
        figures = self._tracked.find_figures()
        if self._scheduler.problem and self._single.tells_rips:
            # KVM tells of all but the few that only a trace could judge.
            untold: dict[VmKey, dict[int, VcpuFigures]] = {}
            for vcpu in self._tracked:
                if not self._is_told(vcpu):
                    of_vm = untold.setdefault(vcpu.key.vm, {})
                    of_vm[vcpu.key.vcpu_id] = vcpu.figures._replace(can_judge=False)
            for key in figures.keys() & untold.keys():
                figures[key] = build_vm_figures({**figures[key].vcpus, **untold[key]})
        return figures

    def _find_problem(self, vcpu: TrackedVcpu) -> str:
        """Say why nothing tells where a vCPU's notify exits are, "" where something does."""
        return "" if self._is_told(vcpu) else self._scheduler.problem

    def _tell(self, report: VcpuReport, now: float) -> None:
        self._stall_log.tell(report, now, self._unix())

    async def _close(self) -> None:
        await self._scheduler.close()
        await self._instructions.close()
        await self._processes.close()
        await self._trigger.close()
        if self._workers is not None:
            self._workers.close()
