"""CPU time of vCPU threads: a stuck vCPU burns its core, a paused one does not."""

from __future__ import annotations

import psutil


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
