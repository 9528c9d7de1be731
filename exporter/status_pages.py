"""Answers for the status page, at a cost that does not grow with the number of those who look.

- The host is looked at anew at most every ``LOOK_SECONDS``, by whoever comes first, in a thread of its own. Nobody
  waits for a look that takes long: the page then shows the last one, and says how old it is.
- What is known is put together at most every ``PICTURE_SECONDS``, and rendered once for all who ask the same.
- Searches have a budget each second, one for this machine and one for everybody else: whoever asks for ever new words
  gets 503 in the end, and the page without a search is not touched by that.

While a vCPU takes notify exits, the host is looked at every ``SAMPLE_SECONDS`` also when nobody asks, so that whoever
opens the page after a warning sees what has happened. It is a look like a scrape's: no guest notices.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from aiohttp import web

from exporter import api, status_page
from exporter.lately import Lately
from exporter.stall_pages import Watcher, find_peer
from exporter.status import Picture, clean_query, take_picture
from exporter.verdicts import State
from kvm.model import Snapshot

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
LOOK_WAIT_SECONDS: Final = 0.5
PICTURE_SECONDS: Final = 0.5
SHARE: Final = 20
MAX_PICTURE_SECONDS: Final = 2.0
SAMPLE_SECONDS: Final = 5.0
SEARCHES_A_SECOND: Final = 10.0
SEARCH_BURST: Final = 20.0
MAX_ANSWERS: Final = 64


class _Question(NamedTuple):
    """What makes one answer another than the next."""

    is_page: bool
    query: str
    with_details: bool
    refresh: bool


class _Answer(NamedTuple):
    body: bytes
    etag: str
    made_seconds: float


class Budget:
    """So many a second, and some more after a pause."""

    def __init__(self, a_second: float, burst: float, clock: Callable[[], float]) -> None:
        self._a_second, self._burst, self._clock = a_second, burst, clock
        self._left, self._at = burst, clock()

    def take(self) -> bool:
        """Take one; False where none is left."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._a_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class StatusPages:
    """The handlers of the page and of its changing parts; ``run`` is to go on for as long as they are asked."""

    def __init__(self, lately: Lately, watcher: Watcher | None, frame: status_page.Frame) -> None:
        self._lately, self._watcher, self._frame = lately, watcher, frame
        self._clock: Callable[[], float] = time.monotonic
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="status")
        self._rendering = asyncio.Lock()
        self._looking: asyncio.Future[Snapshot] | None = None
        self._picture: Picture | None = None
        self._picture_until = 0.0
        self._answers: dict[_Question, _Answer] = {}
        self._under_way: dict[_Question, asyncio.Task[_Answer]] = {}
        self._budgets = {is_local: Budget(SEARCHES_A_SECOND, SEARCH_BURST, self._clock) for is_local in (True, False)}

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Keep the history while the application runs, and give the threads back when it ends."""
        sampling = asyncio.create_task(self._sample())
        yield
        tasks = {sampling, *self._under_way.values()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def answer_page(self, request: web.Request) -> web.Response:
        """Answer with the whole page."""
        return await self._answer(request, is_page=True)

    async def answer_parts(self, request: web.Request) -> web.Response:
        """Answer with what changes of it; with 304 where nothing has."""
        return await self._answer(request, is_page=False)

    async def _answer(self, request: web.Request, *, is_page: bool) -> web.Response:
        question = _Question(
            is_page,
            clean_query(request.query.get("q", "")),
            api.is_local(find_peer(request), request.headers),
            is_page and "refresh" in request.query,
        )
        answer = self._find(question)
        if answer is None:
            is_new = question not in self._under_way
            if is_new and question.query and not self._budgets[question.with_details].take():
                return web.Response(
                    status=503, text="too many searches, try again later\n", headers={"Retry-After": "1"}
                )
            answer = await asyncio.shield(self._begin(question))
        headers = dict(status_page.make_headers() if is_page else api.PRIVATE_HEADERS)
        headers["ETag"] = answer.etag
        if request.headers.get("If-None-Match") == answer.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=answer.body, content_type="text/html", charset="utf-8", headers=headers)

    def _find(self, question: _Question) -> _Answer | None:
        answer = self._answers.get(question)
        return answer if answer and self._clock() - answer.made_seconds < PICTURE_SECONDS else None

    def _begin(self, question: _Question) -> asyncio.Task[_Answer]:
        """Have an answer made; it is made to its end, so that clients that hang up cause no more work than others."""
        task = self._under_way.get(question)
        if task is None:
            task = self._under_way[question] = asyncio.create_task(self._render(question))
            task.add_done_callback(lambda done: self._finish(question, done))
        return task

    def _finish(self, question: _Question, task: asyncio.Task[_Answer]) -> None:
        self._under_way.pop(question, None)
        if not task.cancelled() and (err := task.exception()):
            log.debug("the status page was not rendered", extra={"fields": {"why": repr(err)}})

    async def _render(self, question: _Question) -> _Answer:
        async with self._rendering:
            await self._look(LOOK_SECONDS, LOOK_WAIT_SECONDS)
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._workers, self._render_now, question)
        if len(self._answers) >= MAX_ANSWERS:
            now = self._clock()
            self._answers = {q: a for q, a in self._answers.items() if now - a.made_seconds < PICTURE_SECONDS}
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
        self._answers[question] = answer
        return answer

    def _render_now(self, question: _Question) -> _Answer:
        """Render one answer; in a worker thread, one at a time."""
        picture, now, began = self._picture, self._clock(), time.thread_time()
        if picture is None or now >= self._picture_until:
            report = self._watcher.report() if self._watcher else None
            picture = take_picture(self._lately.snapshot, report, self._lately.history, now, time.time())
            self._picture = picture
            # However many vCPUs there are to tell of, most of the CPU's time is for others.
            self._picture_until = now + min(
                MAX_PICTURE_SECONDS, max(PICTURE_SECONDS, SHARE * (time.thread_time() - began))
            )
        found = picture.find(question.query, question.with_details)
        if question.is_page:
            text = status_page.render_page(self._frame, picture, found, question.with_details, question.refresh)
        else:
            text = status_page.render_parts(self._frame, picture, found, question.with_details)
        body = text.encode(errors="replace")
        return _Answer(body, f'"{hashlib.blake2s(body, digest_size=12).hexdigest()}"', now)

    async def _look(self, max_age_seconds: float, wait_seconds: float) -> None:
        """Have the host looked at, unless somebody has done so just now; wait a while for it and no longer."""
        snapshot = self._lately.snapshot
        if snapshot is not None and self._clock() - snapshot.monotonic_seconds < max_age_seconds:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(self._workers, self._lately.read)
            self._looking.add_done_callback(_tell_failure)
        await asyncio.wait({self._looking}, timeout=wait_seconds)

    async def _sample(self) -> None:
        """Look at the host now and then while something happens on it."""
        loop, watcher = asyncio.get_running_loop(), self._watcher
        while watcher is not None:
            await asyncio.sleep(SAMPLE_SECONDS)
            try:
                report = await loop.run_in_executor(self._workers, watcher.report)
                if any(vcpu.verdict.state is not State.QUIET and not vcpu.drill for vcpu in report.vcpus):
                    await self._look(SAMPLE_SECONDS, LOOK_WAIT_SECONDS)
            except Exception as err:  # noqa: BLE001 - a plot with a gap is better than none from now on
                log.debug("the history was not kept", extra={"fields": {"why": repr(err)}})


def _tell_failure(look: asyncio.Future[Snapshot]) -> None:
    if not look.cancelled() and (err := look.exception()):
        log.error("a look at the host failed", extra={"fields": {"why": repr(err)}})
