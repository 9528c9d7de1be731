"""From the start of an agent that serves to its end: signals, and what the service manager is told at each."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Final

from exporter.logs.rate_limit import RateLimitedLog
from exporter.monitor.stall_monitor import StallMonitor
from exporter.service.heartbeat import Heartbeat
from exporter.service.manager import ServiceManager

log = logging.getLogger(__name__)

MAX_RELOADS: Final = 2
# An agent that was told to end has done so after 2 s, whatever hangs.
STOP_SECONDS: Final = 1.8


class Lifetime:
    """What is to happen at a signal; ``reload`` reads files anew, for a reason that it logs."""

    def __init__(self, manager: ServiceManager, reload: Callable[[str], Coroutine[object, object, None]]) -> None:
        self.stop = asyncio.Event()
        self._manager, self._reload = manager, reload
        self._is_ready = False
        self._reloads: set[asyncio.Task[None]] = set()

    def tell_ready(self) -> None:
        """Say that clients can connect."""
        self._is_ready = True
        self._manager.tell(READY=1)

    def start_reload(self) -> None:
        """Read files anew, soon."""
        if len(self._reloads) < MAX_RELOADS:  # one under way, and one that sees what has changed since it began
            task = asyncio.get_running_loop().create_task(self._reload_and_tell())
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    def end(self) -> None:
        """Begin to end, and be done in time."""
        if not self.stop.is_set():
            self._manager.tell(STOPPING=1)
            end_after(STOP_SECONDS)
            self.stop.set()

    async def _reload_and_tell(self) -> None:
        is_told = self._is_ready and not self.stop.is_set()
        if is_told:
            self._manager.tell_reloading()
        try:
            await self._reload("SIGHUP")
        finally:
            if is_told and not self.stop.is_set():
                self._manager.tell(READY=1)


def end_after(seconds: float) -> None:
    """End the process after so long, if it has not ended: a thread that waits for the kernel cannot be cancelled."""

    def give_up() -> None:
        names = sorted(thread.name for thread in threading.enumerate() if thread is not timer)
        log.warning("ended before all of it had", extra={"fields": {"seconds": seconds, "threads": ",".join(names)}})
        os._exit(0)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


def tell_failure(log: RateLimitedLog, _loop: asyncio.AbstractEventLoop, context: Mapping[str, object]) -> None:
    """Write a line where asyncio would write a traceback, each time."""
    what = str(context.get("message", "no message"))
    log.write(logging.ERROR, "the event loop met a failure", err=repr(context.get("exception", "")), reason=what)


async def run_until_signalled(
    monitor: StallMonitor,
    serve: Callable[[asyncio.Event, Callable[[], None]], Awaitable[None]],
    heartbeat: Heartbeat,
    lifetime: Lifetime,
) -> None:
    """Serve and monitor until SIGINT or SIGTERM, then finish what is under way; SIGHUP has files read anew."""
    loop, stop_monitor = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(partial(tell_failure, RateLimitedLog()))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lifetime.end)
    loop.add_signal_handler(signal.SIGHUP, lifetime.start_reload)
    monitor_task = asyncio.create_task(monitor.run(stop_monitor))
    # It ends only when told to. If it fails all the same, the agent ends with it: it would look healthy without.
    monitor_task.add_done_callback(lambda _: lifetime.stop.set())
    beating = asyncio.create_task(heartbeat.run())
    try:
        await serve(lifetime.stop, lifetime.tell_ready)
    finally:
        beating.cancel()
        stop_monitor.set()  # only now: the last scrape still asks the monitor
        await monitor_task
