"""About clients that do not behave: a handful of lines a minute, however many they are.

aiohttp writes some kilobytes with a traceback for each request that it cannot parse, and its answer names Python and
its versions. ``HttpProtocol`` does neither, and it bounds what a connection can make the agent keep.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import StreamReader, web

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.access import find_client, name_client

log = logging.getLogger(__name__)

SERVER: Final = "kvm-notify-exporter"

# What one connection can hold. No scraper's request has a head of 2 KiB, and none sends the next before its answer.
# aiohttp knew neither limit before 3.14, and Debian has older ones.
MAX_HEAD_BYTES: Final = 1 << 15
MAX_WAITING_REQUESTS: Final = 1000


class HttpProtocol(web.RequestHandler):
    """aiohttp's side of a connection, but for what it does when something is wrong."""

    __slots__ = ("_head_bytes", "_last_payload", "_rate_limited_log")

    def __init__(self, manager: web.Server, rate_limited_log: RateLimitedLog, **options: object) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(manager, loop=loop, **options)  # type: ignore[arg-type]
        self._rate_limited_log = rate_limited_log
        self._head_bytes = 0
        self._last_payload: StreamReader | None = None

    def data_received(self, data: bytes) -> None:
        """Take what has come in; of a request that makes no sense keep why it does not, and nothing else.

        aiohttp keeps the exception, whose traceback leads to the 256 KiB that were being read, and by them back to
        itself. The garbage collector finds such a circle only after some thousand others, and they would be 400 MB.
        """
        is_body = self._last_payload is not None and not self._last_payload.is_eof()
        super().data_received(data)
        if self._messages:
            message, self._last_payload = self._messages[-1]
            self._head_bytes = 0
            refused: BaseException | None = getattr(message, "exc", None)
            while refused is not None:
                refused.__traceback__ = None
                refused = refused.__context__
        elif not is_body:
            self._head_bytes += len(data)
        unparsed = max(self._head_bytes, len(self._message_tail))
        if unparsed > MAX_HEAD_BYTES or len(self._messages) > MAX_WAITING_REQUESTS:
            self._cut(f"{unparsed} bytes without a request, {len(self._messages)} requests wait")

    def _cut(self, reason: str) -> None:
        """Let go of a client that sends ever more, and of all that it has sent."""
        self._messages.clear()
        self._message_tail = b""
        if self.transport is not None:
            client = name_client(self.transport.get_extra_info("peername"))
            self._rate_limited_log.write(logging.INFO, "malformed request refused", client=client, err=reason)
            self.transport.abort()

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
