"""HTTP: the metrics, the status page, health.

Snapshots and rendering run in one worker thread, so that scrapes take turns and the event loop never waits for the
kernel. Who asks for the same while others wait for it shares their document (``renderings``). A document counts against
``max_requests`` until its last byte is written, and writing has a time limit, which is short where somebody else needs
the place: so slow readers pin ``max_requests`` documents at most, and keep nobody out. Idle connections pin none
(``document``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from aiohttp import web

from exporter.history.recorder import SnapshotRecorder
from exporter.logs.rate_limit import RateLimitedLog
from exporter.prometheus.collector import HostCollector
from exporter.status_page import page
from exporter.web.acceptor import Acceptor
from exporter.web.connection_guard import NEXT_REQUEST_SECONDS, ConnectionGuard, find_limits
from exporter.web.gate import Gate
from exporter.web.listeners import Address, ListenError, find_address, open_sockets
from exporter.web.metrics_handler import MetricsApp
from exporter.web.protocol import SERVER, HttpProtocol
from exporter.web.settings import DRILL_PATH, HEALTHY_PATH, READY_PATH, STATUS_PATH, VCPUS_PATH, ServerSettings
from exporter.web.stall_handlers import StallHandlers, Watcher
from exporter.web.status_handlers import StatusHandlers
from exporter.web.web_config_file import LoadedConfig, WebConfigFile

log = logging.getLogger(__name__)

# A request with a body is answered without reading it; what is still coming is waited for this long.
LINGER_SECONDS: Final = 1.0


def create_app(
    collector: HostCollector,
    recorder: SnapshotRecorder,
    settings: ServerSettings,
    *,
    guard: ConnectionGuard,
    gate: Gate,
    rate_limited_log: RateLimitedLog,
    watcher: Watcher | None = None,
) -> web.Application:
    """Make the application; it owns neither the collector nor its reader, nor the watcher, nor the gate."""
    pages = MetricsApp(collector, settings, guard, rate_limited_log)
    stalls = StallHandlers(watcher, recorder, pages.turn_away)
    app = web.Application(middlewares=[pages.frame_request, gate.admit])
    app.router.add_get(settings.telemetry_path, pages.answer_metrics)
    app.router.add_get(HEALTHY_PATH, pages.answer_healthy)
    app.router.add_get(READY_PATH, pages.answer_ready)
    app.router.add_get(VCPUS_PATH, stalls.answer_vcpus)
    app.router.add_post(DRILL_PATH, stalls.answer_drill)
    app.on_response_prepare.append(partial(_set_headers, gate))
    app.cleanup_ctx.extend((pages.run_worker, stalls.run))
    if settings.telemetry_path != "/":
        links = {"Metrics": settings.telemetry_path, "vCPUs as JSON": VCPUS_PATH}
        links |= {"Healthy": HEALTHY_PATH, "Ready": READY_PATH}
        build = collector.build
        frame = page.Frame(build.version, build.revision, settings.host_name, links)
        status = StatusHandlers(recorder, watcher, frame, rate_limited_log, limits=settings.status)
        app.router.add_get("/", status.answer_page)
        app.router.add_get(STATUS_PATH, status.answer_parts)
        app.cleanup_ctx.append(status.run)
    return app


@asynccontextmanager
async def open_server(
    collector: HostCollector,
    recorder: SnapshotRecorder,
    settings: ServerSettings,
    guard: ConnectionGuard | None = None,
    *,
    watcher: Watcher | None = None,
    web_config: WebConfigFile | None = None,
) -> AsyncIterator[tuple[Address, ...]]:
    """Serve inside the context, which gets the addresses as the kernel chose them.

    ``recorder`` is what the collector takes its snapshots through, ``web_config`` says who is let in and how. At the
    end nobody new is let in, what is under way has ``drain_seconds`` to finish, then connections are cut. Raises
    ListenError.
    """
    limits = find_limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    guard, rate_limited_log = guard or ConnectionGuard(limits.connections), RateLimitedLog()
    gate = Gate(lambda: web_config.current if web_config else None, settings, rate_limited_log)
    app = create_app(
        collector, recorder, settings, guard=guard, gate=gate, rate_limited_log=rate_limited_log, watcher=watcher
    )
    runner = web.AppRunner(app)
    if web_config:
        web_config.on_reload = partial(_cut_untrusted, guard)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(gate))
        sockets = [stack.enter_context(sock) for sock in settings.passed_sockets]
        sockets += stack.enter_context(open_sockets(settings.addresses))
        for address in settings.optional_addresses:
            try:
                sockets += stack.enter_context(open_sockets((address,)))
            except ListenError as err:
                log.warning("not listened on", extra={"fields": {"address": str(address), "err": err}})
        await runner.setup()
        acceptor: Acceptor | None = None
        try:
            manager = runner.server
            if manager is None:
                raise RuntimeError("aiohttp's runner was set up and has no server")
            make_protocol = partial(
                HttpProtocol,
                manager,
                rate_limited_log,
                access_log=None,
                auto_decompress=False,
                keepalive_timeout=NEXT_REQUEST_SECONDS,
                lingering_time=LINGER_SECONDS,
            )
            acceptor = Acceptor(
                guard.wrap(make_protocol),
                lambda: web_config.current.context if web_config else None,
                rate_limited_log,
                limits.handshakes,
            )
            acceptor.start(sockets)
            yield tuple(find_address(sock) for sock in sockets)
        finally:
            if acceptor:
                await acceptor.close()
            for sock in sockets:  # from now on clients are refused, not kept waiting
                sock.close()
            guard.abort_idle()  # aiohttp would give these the time too that is for requests under way
            if runner.server is not None:  # before aiohttp 3.9, its runner waits for connections of its own sites only
                await runner.server.shutdown(settings.drain_seconds)
            await runner.cleanup()
            guard.abort_all()


async def serve(
    collector: HostCollector,
    recorder: SnapshotRecorder,
    settings: ServerSettings,
    stop: asyncio.Event,
    watcher: Watcher | None = None,
    *,
    web_config: WebConfigFile | None = None,
    tell_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until ``stop`` is set, and tell when clients can connect; raises ListenError."""
    async with open_server(collector, recorder, settings, watcher=watcher, web_config=web_config) as listening:
        for address in listening:
            log.info("listening", extra={"fields": {"address": str(address)}})
        tell_ready()
        watching = asyncio.create_task(web_config.watch()) if web_config else None
        try:
            await stop.wait()
        finally:
            if watching:
                watching.cancel()
        log.info("stopping")


def _cut_untrusted(guard: ConnectionGuard, before: LoadedConfig, now: LoadedConfig) -> None:
    """Let clients connect anew where other certificates are asked for now; requests under way are answered."""
    if before.context and now.context and before.context.trust != now.context.trust:
        guard.abort_idle()


async def _set_headers(gate: Gate, request: web.Request, response: web.StreamResponse) -> None:
    for name, value in gate.headers.items():
        response.headers.setdefault(name, value)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = SERVER
