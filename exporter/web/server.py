"""HTTP: the metrics, the status page, health.

Looking and rendering run in one worker thread, so that scrapes take turns and the event loop never waits for the
kernel. A scrape counts against ``max_requests`` until its last byte is written, and writing has a time limit: so what
slow readers can pin is ``max_requests`` documents, for ``WRITE_SECONDS``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from aiohttp import web

from exporter.history.recorder import Lately
from exporter.prometheus.collector import BadSelection, HostCollector, select_collectors
from exporter.prometheus.exposition import (
    Format,
    accepts_gzip,
    compress_document,
    open_self_metrics,
    parse_accept,
    render_document,
)
from exporter.stalls import drill
from exporter.status_page import page
from exporter.web import vcpus_json
from exporter.web.connection_guard import NEXT_REQUEST_SECONDS, ConnectionGuard
from exporter.web.listeners import BACKLOG, Address, TcpAddress, find_address, open_sockets, parse_address
from exporter.web.protocol import SERVER, Complaints, HttpProtocol
from exporter.web.stall_handlers import StallPages, Watcher
from exporter.web.status_handlers import StatusPages

__all__ = ["ServerSettings", "create_app", "open_server", "parse_address", "serve"]

log = logging.getLogger(__name__)

HEALTHY_PATH: Final = "/-/healthy"
READY_PATH: Final = "/-/ready"
WRITE_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 5.0
# A request with a body is answered without reading it; what is still coming is waited for this long.
LINGER_SECONDS: Final = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How to serve.

    ``addresses`` are where to listen, ``telemetry_path`` where the metrics are, ``max_requests`` how many scrapes may
    be under way at once (0: any number), ``exporter_metrics`` whether the process_* and python_* metrics of the agent
    itself are among them, ``host_name`` how the status page calls this machine. Raises ValueError for a path that
    cannot be served.
    """

    addresses: tuple[Address, ...] = (TcpAddress("", 9750),)
    telemetry_path: str = "/metrics"
    max_requests: int = 40
    exporter_metrics: bool = True
    host_name: str = ""
    write_seconds: float = WRITE_SECONDS
    drain_seconds: float = DRAIN_SECONDS

    def __post_init__(self) -> None:
        path = self.telemetry_path
        if not path.startswith("/") or not path.isprintable() or any(char in path for char in "{}?#%\\ "):
            raise ValueError(f"telemetry path {path!r}: want a plain path such as /metrics")
        if path in (HEALTHY_PATH, READY_PATH, vcpus_json.PATH, drill.PATH, page.PATH):
            raise ValueError(f"telemetry path {path!r} is taken by the agent itself")


class MetricsApp:
    """The handlers and what they share; ``create_app`` makes an aiohttp application of it."""

    def __init__(
        self, collector: HostCollector, settings: ServerSettings, guard: ConnectionGuard, complaints: Complaints
    ) -> None:
        self._collector = collector
        self._settings = settings
        self._guard = guard
        self._complaints = complaints
        self._self_metrics = open_self_metrics(settings.exporter_metrics)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scrape")
        self._scrapes = 0

    async def run_worker(self, app: web.Application) -> AsyncIterator[None]:
        """Take a first look while the application starts, and let the worker finish when it ends."""
        loop = asyncio.get_running_loop()
        first_look: asyncio.Future[object] = loop.run_in_executor(self._worker, self._collector.collect)
        yield
        last_job: asyncio.Future[object] = loop.run_in_executor(self._worker, _do_nothing)
        drain_seconds = self._settings.drain_seconds
        _, unfinished = await asyncio.wait({first_look, last_job}, timeout=drain_seconds)
        if unfinished:
            log.warning("a look at the host still goes on", extra={"fields": {"waited_seconds": drain_seconds}})
        for job in unfinished:
            job.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def frame_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer one request, the writing included, and bound what it can hold meanwhile."""
        transport, is_scrape = request.transport, request.path == self._settings.telemetry_path
        client = request.remote or "unix socket"
        self._guard.begin(transport)
        self._scrapes += is_scrape
        try:
            response = await self._answer(request, handler)
            async with asyncio.timeout(self._settings.write_seconds):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            self._complaints.write(logging.WARNING, "client reads too slowly and is cut off", client=client)
            if transport is not None:
                transport.abort()
        except ConnectionError as err:
            log.debug("client has gone", extra={"fields": {"client": client, "why": repr(err)}})
        finally:
            self._scrapes -= is_scrape
            self._guard.end(transport)
        return response

    async def answer_metrics(self, request: web.Request) -> web.Response:
        """Look at the host and answer in the format that the client likes best."""
        limit = self._settings.max_requests
        if limit and self._scrapes > limit:
            return _render_text(503, f"limit of concurrent requests reached ({limit}), try again later")
        query = request.query
        try:
            selected = select_collectors(
                self._collector.settings.enabled, query.getall("collect[]", []), query.getall("exclude[]", [])
            )
        except BadSelection as err:
            return _render_text(400, str(err))
        form = parse_accept(",".join(request.headers.getall("Accept", [])))
        zipped = accepts_gzip(",".join(request.headers.getall("Accept-Encoding", [])))
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._worker, self._scrape, selected, form, zipped)
        headers = {"Content-Type": form.content_type, "Vary": "Accept, Accept-Encoding"}
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def answer_healthy(self, request: web.Request) -> web.Response:
        """Say that the agent runs and answers."""
        return _render_text(200, "healthy")

    async def answer_ready(self, request: web.Request) -> web.Response:
        """Say whether a first look at the host has been taken, so that every source has been tried."""
        if self._collector.snapshot is None:
            return _render_text(503, "not ready: the first look at the host has not ended yet")
        return _render_text(200, "ready")

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run the handler; whatever goes wrong in it becomes a short answer in plain text."""
        try:
            return await handler(request)
        except web.HTTPException as err:
            response = _render_text(err.status, err.reason.lower())
            if "Allow" in err.headers:
                response.headers["Allow"] = err.headers["Allow"]
            return response
        except Exception as err:
            self._complaints.write(logging.ERROR, "request failed", path=request.path, why=repr(err))
            log.debug("request failed", extra={"fields": {"path": request.path}}, exc_info=True)
            return _render_text(500, "internal error; the agent's log says more")

    def _scrape(self, selected: frozenset[str], form: Format, zipped: bool) -> bytes:
        document = render_document(self._collector.collect(selected), self._self_metrics, form)
        return compress_document(document) if zipped else document


def create_app(
    collector: HostCollector,
    lately: Lately,
    settings: ServerSettings,
    *,
    guard: ConnectionGuard,
    complaints: Complaints,
    watcher: Watcher | None = None,
) -> web.Application:
    """Make the application; it owns neither the collector nor its reader, nor the watcher."""
    pages, stalls = MetricsApp(collector, settings, guard, complaints), StallPages(watcher)
    app = web.Application(middlewares=[pages.frame_request])
    app.router.add_get(settings.telemetry_path, pages.answer_metrics)
    app.router.add_get(HEALTHY_PATH, pages.answer_healthy)
    app.router.add_get(READY_PATH, pages.answer_ready)
    app.router.add_get(vcpus_json.PATH, stalls.answer_vcpus)
    app.router.add_post(drill.PATH, stalls.answer_drill)
    app.on_response_prepare.append(_set_headers)
    app.cleanup_ctx.append(pages.run_worker)
    if settings.telemetry_path != "/":
        links = {"Metrics": settings.telemetry_path, "vCPUs as JSON": vcpus_json.PATH}
        links |= {"Healthy": HEALTHY_PATH, "Ready": READY_PATH}
        build = collector.build
        status = StatusPages(lately, watcher, page.Frame(build.version, build.revision, settings.host_name, links))
        app.router.add_get("/", status.answer_page)
        app.router.add_get(page.PATH, status.answer_parts)
        app.cleanup_ctx.append(status.run)
    return app


@asynccontextmanager
async def open_server(
    collector: HostCollector,
    lately: Lately,
    settings: ServerSettings,
    guard: ConnectionGuard | None = None,
    watcher: Watcher | None = None,
) -> AsyncIterator[tuple[Address, ...]]:
    """Serve inside the context, which gets the addresses as the kernel chose them.

    ``lately`` is what the collector takes its looks through. At the end nobody new is let in, what is under way has
    ``drain_seconds`` to finish, then connections are cut. Raises ListenError.
    """
    guard, complaints = guard or ConnectionGuard(), Complaints()
    runner = web.AppRunner(
        create_app(collector, lately, settings, guard=guard, complaints=complaints, watcher=watcher),
        handler_cancellation=True,
        shutdown_timeout=settings.drain_seconds,
    )
    with open_sockets(settings.addresses) as sockets:
        await runner.setup()
        servers: list[asyncio.Server] = []
        try:
            loop, manager = asyncio.get_running_loop(), runner.server
            if manager is None:
                raise RuntimeError("aiohttp's runner was set up and has no server")
            make_protocol = partial(
                HttpProtocol,
                manager,
                complaints,
                access_log=None,
                auto_decompress=False,
                keepalive_timeout=NEXT_REQUEST_SECONDS,
                lingering_time=LINGER_SECONDS,
            )
            for sock in sockets:
                servers.append(await loop.create_server(guard.wrap(make_protocol), sock=sock, backlog=BACKLOG))
            yield tuple(find_address(sock) for sock in sockets)
        finally:
            for server in servers:
                server.close()
            await runner.cleanup()
            guard.abort_all()


async def serve(
    collector: HostCollector,
    lately: Lately,
    settings: ServerSettings,
    stop: asyncio.Event,
    watcher: Watcher | None = None,
) -> None:
    """Serve until ``stop`` is set; raises ListenError."""
    async with open_server(collector, lately, settings, watcher=watcher) as listening:
        for address in listening:
            log.info("listening", extra={"fields": {"address": str(address)}})
        await stop.wait()
        log.info("stopping")


def _do_nothing() -> None:
    """End: when the worker has come to this, it has done all that was asked of it."""


def _render_text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", content_type="text/plain")


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = SERVER
