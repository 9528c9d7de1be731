"""One trace session of one vCPU thread: arms it, feeds the records to the detector, and always disarms it.

A session that finds nothing ends soon; one that finds the vCPU at one RIP goes on until a stall is certain or refuted,
because what happens between two sessions proves nothing. Records come in bursts of at most ``SESSION_RECORDS`` each
``PACE_SECONDS``: a guest that floods makes some hundred records a second and not some hundred thousand.

What waits for the kernel (arming, refreshing and disarming, the progress event, reading registers) runs in worker
threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from exporter.monitor.backends import Armed, Reading, Records, Run, Tracer
from exporter.stalls.detector import StallDetector
from exporter.stalls.evidence import CPU_SAMPLE_SECONDS
from exporter.stalls.verdicts import State, Verdict
from kvm.errors import VmGone

PACE_SECONDS: Final = 0.1
# A wake-up that got lost costs this much and no more.
WAIT_SECONDS: Final = 0.25
SILENT_INTERVALS: Final = 3
SILENT_SECONDS: Final = 0.5


@dataclass(slots=True)
class Subject:
    """Whom a session is about.

    ``is_there`` tells whether ``tid`` still is a thread of the VM's process. ``read`` reads registers and counters,
    ``read_cpu_time`` the thread's CPU time in seconds; None where they cannot be had. ``on_change`` takes verdicts as
    they come.
    """

    tid: int
    detector: StallDetector
    is_there: Callable[[], bool]
    read: Callable[[], Reading | None] | None
    read_cpu_time: Callable[[], float | None] | None
    on_change: Callable[[Sequence[Verdict]], None]
    records: int = 0
    lost: int = 0


async def run_trace_session(subject: Subject, tracer: Tracer, run: Run, seconds: float) -> None:
    """Trace for at most so many seconds; raises VmGone and SourceUnavailable where it cannot be done."""
    armed: list[Armed] = []

    def arm() -> None:
        tracer.hold_warm()
        armed.append(tracer.arm(subject.tid))
        if not subject.is_there():
            raise VmGone(f"thread {subject.tid} is no thread of the VM any more")

    try:
        await _outlast(run(arm))
        await _TraceSession(subject, armed[0], run, seconds).run()
    finally:
        subject.detector.end_window()
        for thread in armed:
            await _outlast(run(thread.disarm))


async def _outlast(work: Awaitable[None]) -> None:
    """Wait for a worker, which cannot be stopped; if cancelled meanwhile, re-raise once its work is done."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as err:
            cancelled = err
    task.result()
    if cancelled is not None:
        raise cancelled


class _TraceSession:
    def __init__(self, subject: Subject, armed: Armed, run: Run, seconds: float) -> None:
        self._subject, self._detector = subject, subject.detector
        self._armed = armed
        self._call = run
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._deadline = self._began + seconds
        self._heard = self._began
        self._proofs = self._detector.proofs
        self._seen = 0
        self._watched_rip: int | None = None
        self._cpu_time_at = self._began

    async def run(self) -> None:
        """Take what comes until there is nothing more to learn."""
        self._detector.begin_session()
        if self._detector.suspected:
            await self._watch_other_rips()
        while True:
            found = self._armed.read()
            now = self._clock()
            self._take(found, now)
            if found.gone or self._is_over(now):
                return
            if found.exits:
                await self._watch_other_rips()
                await self._read_cpu_time()
                await self._read()
            if found.lost or len(found.exits) > 1 or self._detector.suspected:
                await self._pace()
            if found.ended:
                await self._call(self._armed.refresh)
            await self._wait(min(self._deadline, self._clock() + WAIT_SECONDS))

    def _take(self, found: Records, now: float) -> None:
        lost = found.lost + found.odd
        if not found.exits and not lost and not found.other_rip:
            return
        self._heard = now
        self._seen += len(found.exits)
        self._subject.records += len(found.exits)
        self._subject.lost += lost
        other_rip = found.other_rip and self._detector.observing
        self._tell(self._detector.observe_records(now, found.exits, lost=lost, other_rip=other_rip))

    async def _watch_other_rips(self) -> None:
        rip = self._detector.rip
        if rip is None or (rip == self._watched_rip and self._detector.observing):
            return
        await self._call(lambda: self._armed.watch_other_rips(rip))
        self._watched_rip = rip
        if self._detector.rip == rip:
            self._detector.start_window(self._clock())

    async def _read(self) -> None:
        read = self._subject.read
        if read is None:
            return
        began = self._clock()
        reading = await self._call(read)
        ended = self._clock()
        if reading is not None:
            self._tell(self._detector.observe_registers(began, ended, reading.registers, reading.nested))
            self._tell(self._detector.observe_counter(began, ended, reading.notify_exits))

    async def _read_cpu_time(self) -> None:
        read, now = self._subject.read_cpu_time, self._clock()
        if read is not None and self._detector.suspected and now >= self._cpu_time_at:
            self._cpu_time_at = now + CPU_SAMPLE_SECONDS
            cpu_seconds = await self._call(read)
            if cpu_seconds is not None:
                self._detector.observe_cpu_time(self._clock(), cpu_seconds)

    async def _pace(self) -> None:
        """Let a guest that floods make its records for a while; not longer than until there is something to decide."""
        now, ripe = self._clock(), self._detector.ripe_seconds
        until = min(self._deadline, now + PACE_SECONDS)
        if ripe is not None and ripe > now:
            until = min(until, ripe)
        await asyncio.sleep(max(0.0, until - now))

    def _is_over(self, now: float) -> bool:
        detector = self._detector
        if now >= self._deadline or detector.proofs != self._proofs or (detector.rip_hidden and self._seen):
            return True
        if detector.state is State.STALLED and self._seen and now - self._began >= PACE_SECONDS:
            return True
        if detector.state is State.SUSPECT:
            return False  # its exits may be irregular, and what another session sees does not connect with this one
        interval = detector.interval_seconds
        silence = now - max(self._heard, self._began)
        return interval is not None and silence >= max(SILENT_SECONDS, SILENT_INTERVALS * interval)

    def _tell(self, changes: Sequence[Verdict]) -> None:
        if changes:
            self._subject.on_change(changes)

    async def _wait(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._armed.fd, ready.set)
        try:
            async with asyncio.timeout_at(until):
                await ready.wait()
        except TimeoutError:
            return  # the caller looks at the clock itself
        finally:
            loop.remove_reader(self._armed.fd)
