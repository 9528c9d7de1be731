"""Answers for the status page, at a cost that does not grow with the number of its readers.

- The host is read anew at most every ``snapshot_seconds``, for whoever comes first, in a thread of its own. A read that
  takes long is waited for once, by all who ask meanwhile together: the page then shows the last one, and says how old
  it is.
- What is known is put together at most every ``view_seconds``, and rendered once for all who ask the same.
- Searches have a share of a core, one for clients that are known and one for everybody else: whoever asks for ever new
  words gets 503 in the end, and the page without a search is not touched by that.

While a vCPU takes notify exits, the host is read every ``sample_seconds`` also when nobody asks, so that whoever
opens the page after a warning sees what has happened. It costs what a scrape does: no guest notices.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from aiohttp import web

from exporter.history.rates import WINDOW_SECONDS
from exporter.history.recorder import SnapshotRecorder
from exporter.logs.rate_limit import RateLimitedLog
from exporter.stalls.verdicts import State, VcpuReport
from exporter.status_page import page
from exporter.status_page.page import hash_asset, read_asset
from exporter.status_page.view import Found, StatusView, clean_query, make_status_view
from exporter.web.access import PRIVATE_HEADERS, sees_details
from exporter.web.cpu_budget import Budget
from exporter.web.settings import StatusLimits
from exporter.web.stall_handlers import Watcher
from kvm.model import Snapshot


class _Question(NamedTuple):
    """What makes one answer another than the next."""

    is_page: bool
    query: str
    with_details: bool
    refresh: bool


class _Answer(NamedTuple):
    body: bytes
    etag: str
    cost_seconds: float


class StatusHandlers:
    """The handlers of the page and of its changing parts; ``run`` is to go on for as long as they are asked.

    ``clock`` is CLOCK_MONOTONIC, ``unix_clock`` the time of day; ``render_parts`` renders what changes of the page.
    """

    def __init__(
        self,
        recorder: SnapshotRecorder,
        watcher: Watcher | None,
        frame: page.Frame,
        rate_limited_log: RateLimitedLog,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        limits: StatusLimits | None = None,
        render_parts: Callable[[page.Frame, StatusView, Found, bool], str] = page.render_parts,
    ) -> None:
        limits = self._limits = limits or StatusLimits()
        self._recorder, self._watcher, self._frame = recorder, watcher, frame
        self._rate_limited_log = rate_limited_log
        self._clock, self._unix_clock, self._render_parts = clock, unix_clock, render_parts
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="status-snapshot")
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="status")
        self._reading: asyncio.Future[Snapshot] | None = None
        self._wait_until = 0.0
        self._view: StatusView | None = None
        self._view_until = 0.0
        self._answers: dict[_Question, asyncio.Task[_Answer]] = {}
        self._budgets = {
            here: Budget(limits.search_share, limits.search_burst_seconds, clock) for here in (True, False)
        }

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Keep the history while the application runs, and give the threads back when it ends."""
        sampling = asyncio.create_task(self._sample())
        yield
        tasks = {sampling, *self._answers.values()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for workers in (self._reader, self._renderer):
            workers.shutdown(wait=False, cancel_futures=True)

    async def answer_page(self, request: web.Request) -> web.Response:
        """Answer with the whole page."""
        return await self._answer(request, is_page=True)

    async def answer_parts(self, request: web.Request) -> web.Response:
        """Answer with what changes of it; with 304 where nothing has."""
        return await self._answer(request, is_page=False)

    async def _answer(self, request: web.Request, *, is_page: bool) -> web.Response:
        query, refresh = clean_query(request.query.get("q", "")), is_page and "refresh" in request.query
        question = _Question(is_page, query, sees_details(request), refresh)
        if question not in self._answers:
            if query and self._is_too_much(question):
                text = "too many searches, try again later\n"
                return web.Response(status=503, text=text, headers={"Retry-After": "1"})
            self._answers[question] = asyncio.create_task(self._render(question))
        # It is made to its end, so that clients that hang up cause no more work than others.
        answer = await asyncio.shield(self._answers[question])
        headers = {**make_headers(), "ETag": answer.etag}
        if request.headers.get("If-None-Match") == answer.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=answer.body, content_type="text/html", charset="utf-8", headers=headers)

    def _is_too_much(self, question: _Question) -> bool:
        """Tell whether there is no place for one more search."""
        under_way = sum(bool(other.query) and not task.done() for other, task in self._answers.items())
        is_full = under_way >= self._limits.searches or len(self._answers) >= self._limits.answers
        return is_full or not self._budgets[question.with_details].is_left

    async def _render(self, question: _Question) -> _Answer:
        """Make an answer, which is good for ``view_seconds``."""
        loop = asyncio.get_running_loop()
        try:
            await self._renew(self._limits.snapshot_seconds)
            answer = await loop.run_in_executor(self._renderer, self._render_now, question)
            if question.query:
                self._budgets[question.with_details].spend(answer.cost_seconds)
            return answer
        finally:
            loop.call_later(self._limits.view_seconds, self._forget, question)

    def _forget(self, question: _Question) -> None:
        task = self._answers.pop(question)
        if not task.cancelled() and (err := task.exception()):
            self._rate_limited_log.write(logging.ERROR, "the status page was not rendered", err=repr(err))

    def _render_now(self, question: _Question) -> _Answer:
        """Render one answer; in a worker thread, one at a time."""
        view = self._draw()
        began = time.thread_time()
        found = view.find(question.query, question.with_details)
        if question.is_page:
            text = page.render_page(self._frame, view, found, question.with_details, question.refresh)
        else:
            text = self._render_parts(self._frame, view, found, question.with_details)
        body = text.encode(errors="replace")
        etag = f'"{hashlib.blake2s(body, digest_size=12).hexdigest()}"'
        return _Answer(body, etag, time.thread_time() - began)

    def _draw(self) -> StatusView:
        """Put together what is known, unless that was done just now."""
        now, began = self._clock(), time.thread_time()
        if self._view is None or now >= self._view_until:
            report = self._watcher.report() if self._watcher else None
            self._view = make_status_view(
                self._recorder.snapshot, report, self._recorder.history, now, self._unix_clock()
            )
            # However many vCPUs there are to tell of, most of the CPU's time is for others.
            rest = (time.thread_time() - began) / self._limits.view_share
            self._view_until = now + min(self._limits.max_view_seconds, max(self._limits.view_seconds, rest))
        return self._view

    async def _renew(self, max_age_seconds: float) -> None:
        """Have the host read, unless that was done just now; wait a while for it and no longer."""
        snapshot = self._recorder.snapshot
        if snapshot is not None and self._clock() - snapshot.monotonic_seconds < max_age_seconds:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._reader, self._recorder.read)
            self._reading.add_done_callback(self._tell_failure)
            self._wait_until = self._clock() + self._limits.snapshot_wait_seconds
        # All who wait for one read wait that long together: one that hangs must not hold each of them up in turn.
        await asyncio.wait({self._reading}, timeout=max(0.0, self._wait_until - self._clock()))

    async def _sample(self) -> None:
        """Read the host now and then while something happens on it."""
        loop, watcher = asyncio.get_running_loop(), self._watcher
        while watcher is not None:
            await asyncio.sleep(self._limits.sample_seconds)
            try:
                report = await loop.run_in_executor(self._renderer, watcher.report)
                if any(_is_lively(vcpu, self._clock()) for vcpu in report.vcpus):
                    await self._renew(self._limits.sample_seconds)
            except Exception as err:  # noqa: BLE001 - a plot with a gap is better than none from now on
                self._rate_limited_log.write(logging.ERROR, "the history was not kept", err=repr(err))

    def _tell_failure(self, read: asyncio.Future[Snapshot]) -> None:
        if not read.cancelled() and (err := read.exception()):
            self._rate_limited_log.write(logging.ERROR, "a snapshot failed", err=repr(err))


def _is_lively(found: VcpuReport, now: float) -> bool:
    """Tell whether a vCPU takes notify exits, or has done so in what a plot shows: what is paused or lost stays so."""
    if found.drill or found.verdict.state is State.QUIET:
        return False
    moved = found.moved_seconds
    return (
        found.verdict.state not in (State.UNKNOWN, State.CONTEXT_LOST) or moved is None or now - moved <= WINDOW_SECONDS
    )


@cache
def make_headers() -> Mapping[str, str]:
    """Return what the page is to be sent with: nothing may load or run but its own style sheet and script."""
    style, script = hash_asset(read_asset("status.css")), hash_asset(read_asset("status.js"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    return {**PRIVATE_HEADERS, "Content-Security-Policy": policy}
