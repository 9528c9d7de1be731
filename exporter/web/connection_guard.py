"""Bounds what clients can hold: how many connections, how long without a request.

aiohttp waits for ever for the first request of a connection, and for the rest of half a request. Descriptors that
strangers hold are descriptors that reading VMs then lacks. A client may close its sending half and wait for the answer
(RFC 9112, 9.6); a scraper that gave up looks just like that, and its place in the queue should not be held. So such a
client gets its answer if that is there within ``HALF_CLOSED_SECONDS``, and is taken for gone then: a request whose
client has gone is cancelled here, which aiohttp does on request, but not before its 3.9.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Final, NamedTuple

MAX_CONNECTIONS: Final = 512
MAX_HANDSHAKES: Final = 64
FIRST_REQUEST_SECONDS: Final = 10.0
# As long as Prometheus keeps an idle connection.
NEXT_REQUEST_SECONDS: Final = 300.0
# Below the usual 10 s of a scraper that begins anew after it has given up.
HALF_CLOSED_SECONDS: Final = 5.0
# A whole request that has come in is taken up at once, if there is one.
TAKE_UP_SECONDS: Final = 0.1


class Limits(NamedTuple):
    """How many connections there may be, and how many TLS handshakes besides."""

    connections: int
    handshakes: int


def find_limits(max_fds: int) -> Limits:
    """Return the limits for so many file descriptors (RLIM_INFINITY for any number): reading VMs needs some, too."""
    if max_fds == resource.RLIM_INFINITY:
        return Limits(MAX_CONNECTIONS, MAX_HANDSHAKES)
    return Limits(max(1, min(MAX_CONNECTIONS, max_fds // 2)), max(1, min(MAX_HANDSHAKES, max_fds // 8)))


class ConnectionGuard:
    """Cuts connections that wait too long, and the longest-waiting one where there are too many.

    The server says ``begin`` when a whole request has come in on a connection, and ``end`` when it is answered; in
    between, the server itself bounds the time.
    """

    def __init__(
        self,
        max_connections: int = MAX_CONNECTIONS,
        first_request_seconds: float = FIRST_REQUEST_SECONDS,
        next_request_seconds: float = NEXT_REQUEST_SECONDS,
        half_closed_seconds: float = HALF_CLOSED_SECONDS,
    ) -> None:
        self._max_connections = max_connections
        self._first_request_seconds = first_request_seconds
        self._next_request_seconds = next_request_seconds
        self._half_closed_seconds = half_closed_seconds
        self._half_closed: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}
        # Those of which something has come in that is not, or not yet, a request that is answered.
        self._heard: set[asyncio.BaseTransport] = set()
        self._open: set[asyncio.BaseTransport] = set()
        self._waiting: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}
        self._answering: dict[asyncio.BaseTransport, asyncio.Task[object]] = {}

    def wrap(self, make_protocol: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """Return a protocol factory whose connections this guard watches."""
        return lambda: _GuardedProtocol(self, make_protocol())

    def begin(self, transport: asyncio.BaseTransport | None) -> None:
        """Stop the clock of a connection: it has sent a request, which the current task answers."""
        self._stop_waiting(transport)
        self._heard -= {transport}
        task = asyncio.current_task()
        if transport in self._open and task is not None:
            self._answering[transport] = task

    def end(self, transport: asyncio.BaseTransport | None) -> None:
        """Start the clock again: the request is answered."""
        if transport is None:
            return
        self._answering.pop(transport, None)
        if transport in self._half_closed:
            self._wait(transport, TAKE_UP_SECONDS, _close)  # or a request that came in behind this one is taken up
        elif transport in self._open:
            self._wait(transport, self._next_request_seconds)

    def abort_idle(self) -> None:
        """Cut the connections on which no request is under way."""
        for transport in tuple(self._waiting):
            _abort(transport)

    def abort_all(self) -> None:
        """Cut what is still open."""
        for transport in tuple(self._open):
            _abort(transport)

    def admit(self, transport: asyncio.BaseTransport) -> None:
        """Take in a new connection; where there are too many, the one that has waited longest goes."""
        if len(self._open) >= self._max_connections:
            longest = next(iter(self._waiting), transport)
            self.release(longest)
            _abort(longest)
            if longest is transport:
                return
        self._open.add(transport)
        self._wait(transport, self._first_request_seconds)

    def hear(self, transport: asyncio.BaseTransport) -> None:
        """Note that something has come in."""
        self._heard.add(transport)

    def half_close(self, transport: asyncio.BaseTransport) -> bool:
        """Tell whether a client that sends no more awaits an answer; it then has a limited time to get it."""
        if transport not in self._open or (transport not in self._heard and transport not in self._answering):
            return False
        if transport.get_extra_info("sslcontext") is not None:
            return False  # asyncio closes both halves
        loop = asyncio.get_running_loop()
        self._half_closed[transport] = loop.call_later(self._half_closed_seconds, _abort, transport)
        if transport not in self._answering:
            self._wait(transport, TAKE_UP_SECONDS, _close)
        return True

    def release(self, transport: asyncio.BaseTransport) -> None:
        """Forget a connection that is closed, and leave off answering it."""
        self._stop_waiting(transport)
        self._heard.discard(transport)
        if transport in self._half_closed:
            self._half_closed.pop(transport).cancel()
        self._open.discard(transport)
        if transport in self._answering:
            self._answering.pop(transport).cancel()

    def _stop_waiting(self, transport: asyncio.BaseTransport | None) -> None:
        if transport in self._waiting:
            self._waiting.pop(transport).cancel()

    def _wait(
        self,
        transport: asyncio.BaseTransport,
        seconds: float,
        end: Callable[[asyncio.BaseTransport], None] | None = None,
    ) -> None:
        self._stop_waiting(transport)
        self._waiting[transport] = asyncio.get_running_loop().call_later(seconds, end or _abort, transport)


class _GuardedProtocol(asyncio.Protocol):
    """Passes everything on to another protocol and tells the guard of beginnings and ends."""

    def __init__(self, guard: ConnectionGuard, inner: asyncio.Protocol) -> None:
        self._guard = guard
        self._inner = inner
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._guard.admit(transport)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._guard.release(self._transport)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self._guard.hear(self._transport)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        self._inner.eof_received()
        return self._transport is not None and self._guard.half_close(self._transport)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _close(transport: asyncio.BaseTransport) -> None:
    transport.close()


def _abort(transport: asyncio.BaseTransport) -> None:
    # Not close(): what the client has not read by now, it does not want.
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
