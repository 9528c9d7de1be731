"""``serve`` and ``demo``: serve metrics over HTTP until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import platform
import signal
from collections.abc import Awaitable, Callable
from typing import Final

from exporter.flags import (
    DEFAULT_ADDRESS,
)
from exporter.history.recorder import SnapshotRecorder
from exporter.monitor.stall_monitor import StallMonitor
from exporter.wiring import WANTED, build_collector, open_host, open_simulated_monitor, open_stall_monitor
from kvm.counters.bpf import BpfSource
from kvm.simulated.host import SimulatedHost

# A snapshot makes some thousand objects and lets go of as many, none of them in a circle. At Python's own threshold of
# 700 that had the collector run seven times a scrape of 10,000 vCPUs: a tenth of its time.
GC_THRESHOLD: Final = 50_000


def run_server(arguments: argparse.Namespace) -> int:
    """Serve this host, or a simulated one, until a signal ends it."""
    # Importing aiohttp takes longer than all the rest of what the other commands do.
    from exporter.web.server import serve  # noqa: PLC0415
    from exporter.web.settings import ServerSettings  # noqa: PLC0415

    settings = ServerSettings(
        addresses=tuple(arguments.listen_addresses or [DEFAULT_ADDRESS]),
        telemetry_path=arguments.telemetry_path,
        max_requests=arguments.max_requests,
        exporter_metrics=not arguments.disable_exporter_metrics,
        host_name=platform.node(),
    )
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
    with contextlib.ExitStack() as stack:
        if arguments.command == "demo":
            simulated = SimulatedHost()
            recorder = SnapshotRecorder(simulated)
            monitor = open_simulated_monitor(arguments, recorder, simulated)
        else:
            bpf = BpfSource(WANTED) if "bpf" in arguments.sources else None
            recorder = SnapshotRecorder(open_host(arguments.sources, stack, bpf=bpf))
            monitor = open_stall_monitor(arguments, recorder, bpf)
        collector = build_collector(recorder, arguments, monitor)
        asyncio.run(run_until_signalled(monitor, lambda stop: serve(collector, recorder, settings, stop, monitor)))
    return 0


async def run_until_signalled(monitor: StallMonitor, serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Serve and monitor until SIGINT or SIGTERM, then finish what is under way."""
    stop, stop_monitor = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    monitor_task = asyncio.create_task(monitor.run(stop_monitor))
    try:
        await serve(stop)
    finally:
        stop_monitor.set()  # only now: the last scrape still asks the monitor
        await monitor_task
