"""About clients that do not behave: a handful of lines a minute, however many they are.

aiohttp writes some kilobytes with a traceback for each request that it cannot parse, and its answer names Python and
its versions. ``HttpProtocol`` does neither.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

log = logging.getLogger(__name__)

SERVER: Final = "kvm-notify-exporter"
LINES: Final = 5
WINDOW_SECONDS: Final = 60.0


@dataclass(slots=True)
class _Kind:
    """Of one kind of line: since when, how many were written, and how many more there would have been."""

    since: float
    written: int = 0
    withheld: int = 0


class Complaints:
    """Writes at most LINES lines of a kind in WINDOW_SECONDS; the first one after that says how many were withheld."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def write(self, level: int, text: str, **fields: object) -> None:
        """Write a line, if there is room for one more of this text."""
        now = self._clock()
        kind = self._kinds.setdefault(text, _Kind(now))
        if now - kind.since >= WINDOW_SECONDS:
            if kind.withheld:
                fields["withheld"] = kind.withheld
            kind.since, kind.written, kind.withheld = now, 0, 0
        if kind.written >= LINES:
            kind.withheld += 1
            return
        kind.written += 1
        log.log(level, text, extra={"fields": fields})


class HttpProtocol(web.RequestHandler):
    """aiohttp's side of a connection, but for what it does when something is wrong."""

    __slots__ = ("_complaints",)

    def __init__(self, manager: web.Server, complaints: Complaints, **options: object) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(manager, loop=loop, **options)  # type: ignore[arg-type]
        self._complaints = complaints

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that makes no sense, or that could not be answered; the connection ends."""
        client = request.remote or "unix socket"
        if status == 400:
            self._complaints.write(logging.INFO, "malformed request refused", client=client, why=type(exc).__name__)
        else:
            self._complaints.write(logging.ERROR, "request failed", client=client, status=status, why=repr(exc))
        if request.writer.output_size > 0:
            raise ConnectionError("part of another answer has been sent already")
        text = "bad request\n" if status == 400 else "internal error; the agent's log says more\n"
        headers = {"Server": SERVER, "X-Content-Type-Options": "nosniff"}
        response = web.Response(status=status, text=text, content_type="text/plain", headers=headers)
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """Write a short line where aiohttp would write a traceback."""
        self._complaints.write(logging.ERROR, "serving a connection failed", why=repr(kw.get("exc_info")))
