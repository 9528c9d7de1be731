"""Accepts connections, and bounds what they cost before HTTP begins.

A client that connects and says nothing is in nobody's count while TLS waits for it: aiohttp sees a connection when
its handshake is done. So connections are accepted here, with the SSLContext in force at that moment, and handshakes
are bounded in number and time. Where there are too many, the one that has waited longest goes, of the client that has
most. Where fds run out, nothing is accepted for a second, and the log says so a few times a minute, not thousands.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.access import name_client
from exporter.web.connection_guard import MAX_HANDSHAKES

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
SHUTDOWN_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 1.0
ACCEPTS_AT_ONCE: Final = 64
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Accepts on listening sockets until it is closed; ``read_context`` says by which context, None for plain HTTP."""

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        read_context: Callable[[], ssl.SSLContext | None],
        rate_limited_log: RateLimitedLog,
        max_handshakes: int = MAX_HANDSHAKES,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._make_protocol, self._read_context = make_protocol, read_context
        self._rate_limited_log = rate_limited_log
        self._max_handshakes, self._handshake_seconds = max_handshakes, handshake_seconds
        self._loop = asyncio.get_running_loop()
        self._listening: set[socket.socket] = set()
        # Handshakes under way and whose they are, in the order in which they came.
        self._handshakes: dict[asyncio.Task[bool], str] = {}
        self._beginning: set[asyncio.Task[bool]] = set()

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept."""
        for sock in sockets:
            self._listening.add(sock)
            self._loop.add_reader(sock, self._accept, sock)

    async def close(self) -> None:
        """Accept no more, and cut what has not begun; the listening sockets stay open."""
        for sock in self._listening:
            self._loop.remove_reader(sock)
        self._listening.clear()
        tasks = tuple(self._beginning)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as err:
                self._rate_limited_log.write(logging.ERROR, "connections cannot be accepted", err=err.strerror)
                # It would be readable again at once, and this called without end.
                self._loop.remove_reader(listening)
                self._loop.call_later(PAUSE_SECONDS if err.errno in _EXHAUSTED else 0.1, self._resume, listening)
                return
            sock.setblocking(False)
            context = self._read_context() if listening.family != socket.AF_UNIX else None
            self._begin(sock, context, name_client(address))

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._listening:
            self._loop.add_reader(listening, self._accept, listening)

    def _begin(self, sock: socket.socket, context: ssl.SSLContext | None, client: str) -> None:
        task = self._loop.create_task(self._connect(sock, context, client))
        self._beginning.add(task)
        task.add_done_callback(lambda done: self._end(done, sock))
        if context is not None:
            if len(self._handshakes) >= self._max_handshakes:
                self._cut_one()
            self._handshakes[task] = client

    def _cut_one(self) -> None:
        """Cut a handshake: the longest of the client that has most of them."""
        counts = Counter(self._handshakes.values())
        task = max(self._handshakes, key=lambda one: counts[self._handshakes[one]])  # the oldest of equals
        client = self._handshakes.pop(task)
        self._rate_limited_log.write(
            logging.WARNING, "too many TLS handshakes, one is cut", client=client, limit=self._max_handshakes
        )
        task.cancel()

    async def _connect(self, sock: socket.socket, context: ssl.SSLContext | None, client: str) -> bool:
        """Hand a connection to HTTP; tells whether that has come about."""
        with_tls = context is not None
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                sock,
                ssl=context,
                ssl_handshake_timeout=self._handshake_seconds if with_tls else None,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS if with_tls else None,
            )
            return True
        except ssl.SSLError as err:
            reason = (err.reason or str(err)).lower().replace("_", " ")
            self._rate_limited_log.write(logging.INFO, "TLS handshake failed", client=client, err=reason)
        except OSError as err:
            log.debug("connection did not begin", extra={"fields": {"client": client, "err": repr(err)}})
        return False

    def _end(self, task: asyncio.Task[bool], sock: socket.socket) -> None:
        """Forget a connection that has begun, or close one that never will."""
        self._beginning.discard(task)
        self._handshakes.pop(task, None)
        err = None if task.cancelled() else task.exception()
        if err:
            self._rate_limited_log.write(logging.ERROR, "a connection failed to begin", err=repr(err))
        if err or task.cancelled() or not task.result():
            sock.close()
