"""Answers scrapes and health, and frames every request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from exporter.host_summary import describe_blindness
from exporter.logs.rate_limit import RateLimitedLog
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import compress_document, open_self_metrics, render_document
from exporter.prometheus.negotiation import Format, accepts_gzip, parse_accept
from exporter.prometheus.selection import BadSelection, select_collectors
from exporter.web.access import find_client
from exporter.web.connection_guard import ConnectionGuard
from exporter.web.document import Document
from exporter.web.settings import ServerSettings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


log = logging.getLogger(__name__)


class MetricsApp:
    """The handlers and what they share; ``create_app`` makes an aiohttp application of it."""

    def __init__(
        self,
        collector: HostCollector,
        settings: ServerSettings,
        guard: ConnectionGuard,
        rate_limited_log: RateLimitedLog,
    ) -> None:
        self._collector = collector
        self._settings = settings
        self._guard = guard
        self._rate_limited_log = rate_limited_log
        self._self_metrics = open_self_metrics(settings.exporter_metrics)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scrape")
        # The ids of scrapes under way, until their last byte is written. Who is not let in is none.
        self._scrapes: set[int] = set()

    async def run_worker(self, app: web.Application) -> AsyncIterator[None]:
        """Take a first snapshot while the application starts, and let the worker finish when it ends."""
        loop = asyncio.get_running_loop()
        first_snapshot: asyncio.Future[object] = loop.run_in_executor(self._worker, self._collector.collect)
        first_snapshot.add_done_callback(self._tell_failure)
        yield
        last_job: asyncio.Future[object] = loop.run_in_executor(self._worker, _do_nothing)
        drain_seconds = self._settings.drain_seconds
        _, unfinished = await asyncio.wait({first_snapshot, last_job}, timeout=drain_seconds)
        if unfinished:
            log.warning("a snapshot is still under way", extra={"fields": {"waited_seconds": drain_seconds}})
        for job in unfinished:
            job.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def frame_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer one request, the writing included, and bound what it can hold meanwhile."""
        transport = request.transport
        client = find_client(request)
        self._guard.begin(transport)
        try:
            response = await self._answer(request, handler)
            async with asyncio.timeout(self._settings.write_seconds):
                if isinstance(response, Document):
                    await response.write_to(request)
                else:
                    await response.prepare(request)
                    await response.write_eof()
        except TimeoutError:
            self._rate_limited_log.write(logging.WARNING, "client reads too slowly and is cut off", client=client)
            if transport is not None:
                transport.abort()
        except ConnectionError as err:
            log.debug("client has gone", extra={"fields": {"client": client, "err": repr(err)}})
        finally:
            self._scrapes.discard(id(request))
            self._guard.end(transport)
        return response

    async def answer_metrics(self, request: web.Request) -> web.StreamResponse:
        """Read the host and answer in the format that the client likes best."""
        limit = self._settings.max_requests
        if limit and len(self._scrapes) >= limit:
            return _render_text(503, f"limit of concurrent requests reached ({limit}), try again later")
        self._scrapes.add(id(request))
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
        return Document(body, headers)

    async def answer_healthy(self, request: web.Request) -> web.Response:
        """Say that the agent runs and answers."""
        return _render_text(200, "healthy")

    async def answer_ready(self, request: web.Request) -> web.Response:
        """Say whether the host is seen: the first snapshot has been taken, and it is not blind."""
        snapshot = self._collector.snapshot
        if snapshot is None:
            return _render_text(503, "not ready: the first snapshot of the host is still under way")
        if snapshot.is_blind:
            return _render_text(503, f"not ready: nothing of this host can be seen: {describe_blindness(snapshot)}")
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
            self._rate_limited_log.write(logging.ERROR, "request failed", path=request.path, err=repr(err))
            log.debug("request failed", extra={"fields": {"path": request.path}}, exc_info=True)
            return _render_text(500, "internal error; the agent's log says more")

    def _tell_failure(self, snapshot: asyncio.Future[object]) -> None:
        if not snapshot.cancelled() and (err := snapshot.exception()):
            self._rate_limited_log.write(logging.ERROR, "a snapshot failed", err=repr(err))

    def _scrape(self, selected: frozenset[str], form: Format, zipped: bool) -> bytes:
        document = render_document(self._collector.collect(selected), self._self_metrics, form)
        return compress_document(document) if zipped else document


def _do_nothing() -> None:
    """End: when the worker has come to this, it has done all that was asked of it."""


def _render_text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", content_type="text/plain")
