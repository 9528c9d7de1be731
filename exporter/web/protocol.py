"""About clients that do not behave: a handful of lines a minute, however many they are.

aiohttp writes some kilobytes with a traceback for each request that it cannot parse, and its answer names Python and
its versions. ``HttpProtocol`` does neither.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import web

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.access import find_client

log = logging.getLogger(__name__)

SERVER: Final = "kvm-notify-exporter"


class HttpProtocol(web.RequestHandler):
    """aiohttp's side of a connection, but for what it does when something is wrong."""

    __slots__ = ("_rate_limited_log",)

    def __init__(self, manager: web.Server, rate_limited_log: RateLimitedLog, **options: object) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(manager, loop=loop, **options)  # type: ignore[arg-type]
        self._rate_limited_log = rate_limited_log

    def data_received(self, data: bytes) -> None:
        """Take what has come in; of a request that makes no sense keep why it does not, and nothing else.

        aiohttp keeps the exception, whose traceback leads to the 256 KiB that were being read, and by them back to
        itself. The garbage collector finds such a circle only after some thousand others, and they would be 400 MB.
        """
        super().data_received(data)
        if self._messages:
            refused: BaseException | None = getattr(self._messages[-1][0], "exc", None)
            while refused is not None:
                refused.__traceback__ = None
                refused = refused.__context__

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that makes no sense, or that could not be answered; the connection ends."""
        client = find_client(request)
        if status == 400:
            self._rate_limited_log.write(
                logging.INFO, "malformed request refused", client=client, err=type(exc).__name__
            )
        else:
            self._rate_limited_log.write(logging.ERROR, "request failed", client=client, status=status, err=repr(exc))
        if request.writer.output_size > 0:
            raise ConnectionError("part of another answer has been sent already")
        text = "bad request\n" if status == 400 else "internal error; the agent's log says more\n"
        headers = {"Server": SERVER, "X-Content-Type-Options": "nosniff"}
        response = web.Response(status=status, text=text, content_type="text/plain", headers=headers)
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """Write a short line where aiohttp would write a traceback."""
        self._rate_limited_log.write(logging.ERROR, "serving a connection failed", err=repr(kw.get("exc_info")))
