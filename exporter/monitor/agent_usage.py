"""What the agent itself uses, by psutil: threads, their CPU time, context switches.

It is read every ``USAGE_SECONDS`` and never for a scrape: psutil reads a file of /proc for each thread.
"""

from __future__ import annotations

import threading
from typing import Final

from exporter.monitor.quiet_psutil import psutil
from exporter.stalls.verdicts import THREAD_KINDS, AgentUsage

USAGE_SECONDS: Final = 15.0


def read_agent_usage() -> AgentUsage | None:
    """Return what this process uses now; None where /proc does not tell."""
    kinds = {thread.native_id: name_kind(thread.name) for thread in threading.enumerate()}
    try:
        process = psutil.Process()
        with process.oneshot():
            threads, switches = process.threads(), process.num_ctx_switches()
    except (psutil.Error, OSError):
        return None
    cpu_seconds = dict.fromkeys(THREAD_KINDS, 0.0)
    for thread in threads:
        cpu_seconds[kinds.get(thread.id, "other")] += thread.user_time + thread.system_time
    return AgentUsage(len(threads), cpu_seconds, switches.voluntary, switches.involuntary)


def name_kind(thread: str) -> str:
    """Name the kind of a thread by its name: that of the pool that it belongs to."""
    kind = "main" if thread == "MainThread" else thread.partition("_")[0].partition("-")[0]
    return kind if kind in THREAD_KINDS else "other"
