"""CPU time of vCPU threads: a stuck vCPU burns its core, a paused one does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from exporter.logs.rate_limit import RateLimitedLog
from exporter.monitor.backends import Run
from exporter.monitor.quiet_psutil import psutil
from exporter.monitor.tracked_vcpu import TrackedVcpu


def read_cpu_time(pid: int, tid: int) -> float | None:
    """Return the seconds, user and system, that a thread has run since it began.

    None where the thread is gone or may not be read. psutil lists all threads of the process, some 15 us each: this is
    for the few vCPUs that are suspected, and never for a scrape.
    """
    try:
        threads = psutil.Process(pid).threads()
    except (psutil.Error, OSError):
        return None
    return next((thread.user_time + thread.system_time for thread in threads if thread.id == tid), None)


def bound_failures(read: Callable[[int, int], float | None]) -> Callable[[int, int], float | None]:
    """Return a reader of CPU time whose failures cost nothing else: evidence is then without it, and a line says so."""
    rate_limited_log = RateLimitedLog()

    def read_or_log(pid: int, tid: int) -> float | None:
        try:
            return read(pid, tid)
        except Exception as err:  # noqa: BLE001 - a stall is called without it as well
            rate_limited_log.write(logging.ERROR, "the CPU time of a vCPU's thread cannot be read", err=repr(err))
            return None

    return read_or_log


async def observe_cpu_times(
    vcpus: Sequence[TrackedVcpu], read: Callable[[int, int], float | None], run: Run, clock: Callable[[], float]
) -> None:
    """Have the detectors of some vCPUs take in the CPU time of their threads."""
    threads = [(vcpu, vcpu.key.vm.pid, vcpu.vcpu.tid) for vcpu in vcpus]

    def read_all() -> list[tuple[TrackedVcpu, float | None, float]]:
        return [(vcpu, None if tid is None else read(pid, tid), clock()) for vcpu, pid, tid in threads]

    for vcpu, cpu_seconds, now in await run(read_all) if threads else ():
        if cpu_seconds is not None:
            vcpu.detector.observe_cpu_time(now, cpu_seconds)
