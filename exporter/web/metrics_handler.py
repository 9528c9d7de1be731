"""Answers scrapes and health, and frames every request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

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
from exporter.web.renderings import Renderings
from exporter.web.settings import ServerSettings

# A scraper reads a document in far less. Who takes longer does so until somebody else needs the place.
SLOW_SECONDS: Final = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


log = logging.getLogger(__name__)


class _Writing(NamedTuple):
    """A document on its way to a client."""

    request: web.BaseRequest
    document_id: int
    since: float


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
        self._renderings = Renderings(self._scrape, self._worker)
        # What is being written, to whom, and since when (the event loop's time); the oldest first.
        self._writing: dict[int, _Writing] = {}

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
                    now = asyncio.get_running_loop().time()
                    self._writing[id(request)] = _Writing(request, response.document_id, now)
                    await response.write_to(request)
                else:
                    await response.prepare(request)
                    await response.write_eof()
                    if isinstance(response, web.Response):
                        response.body = None  # aiohttp keeps the response for as long as the client stays
                # aiohttp waits for what is more than 64 KiB only, and who reads nothing can ask for the rest for ever.
                await request.writer.drain()
        except TimeoutError:
            self._cut(request)
        except ConnectionError as err:
            log.debug("client has gone", extra={"fields": {"client": client, "err": repr(err)}})
        finally:
            self._writing.pop(id(request), None)
            self._guard.end(transport)
        return response

    async def answer_metrics(self, request: web.Request) -> web.StreamResponse:
        """Read the host and answer in the format that the client likes best."""
        refusal = self.turn_away()
        if refusal is not None:
            return refusal
        query = request.query
        try:
            selected = select_collectors(
                self._collector.settings.enabled, query.getall("collect[]", []), query.getall("exclude[]", [])
            )
        except BadSelection as err:
            return _render_text(400, str(err))
        form = parse_accept(",".join(request.headers.getall("Accept", [])))
        zipped = accepts_gzip(",".join(request.headers.getall("Accept-Encoding", [])))
        parts = await self._renderings.render((selected, form, zipped))
        headers = {"Content-Type": form.content_type, "Vary": "Accept, Accept-Encoding"}
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Document(parts, headers)

    def turn_away(self) -> web.Response | None:
        """Return the answer for who asks for one more document than there may be; None where there is room."""
        limit = self._settings.max_requests
        if not limit or self._make_room(limit):
            return None
        return _render_text(503, f"limit of concurrent requests reached ({limit}), try again later")

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

    def _make_room(self, limit: int) -> bool:
        """Tell whether one more document may be made; whoever reads one slowly keeps nobody out."""
        slow_since = asyncio.get_running_loop().time() - SLOW_SECONDS
        for key, writing in tuple(self._writing.items()):
            if self._count_documents() < limit or writing.since > slow_since:
                break
            del self._writing[key]
            self._cut(writing.request)
        return self._count_documents() < limit

    def _count_documents(self) -> int:
        """How many documents are being made or written. What nobody waits for any more is none."""
        return self._renderings.count + len({writing.document_id for writing in self._writing.values()})

    def _cut(self, request: web.BaseRequest) -> None:
        client = request.remote or "unix socket"
        self._rate_limited_log.write(logging.WARNING, "client reads too slowly and is cut off", client=client)
        if request.transport is not None:
            request.transport.abort()

    def _scrape(self, wanted: tuple[frozenset[str], Format, bool]) -> list[bytes]:
        selected, form, zipped = wanted
        document = render_document(self._collector.collect(selected), self._self_metrics, form)
        return compress_document(document) if zipped else document


def _do_nothing() -> None:
    """End: when the worker has come to this, it has done all that was asked of it."""


def _render_text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", content_type="text/plain")
