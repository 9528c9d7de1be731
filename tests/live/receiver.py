"""Who is notified in the end: an HTTP server of the test that keeps what is sent to it."""

from __future__ import annotations

import http.server
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Notification:
    """What was delivered: when (Unix time), to which path, and the JSON document."""

    seconds: float
    path: str
    document: dict[str, Any]


class Receiver:
    """Takes what is sent to it by POST; made by `open_receiver`."""

    def __init__(self) -> None:
        self.port = 0
        self._notifications: list[Notification] = []
        self._news = threading.Condition()

    @property
    def notifications(self) -> list[Notification]:
        with self._news:
            return list(self._notifications)

    def take(self, path: str, body: bytes) -> None:
        with self._news:
            self._notifications.append(Notification(time.time(), path, json.loads(body)))
            self._news.notify_all()

    def wait_for(self, fits: Callable[[Notification], bool], seconds: float) -> Notification | None:
        """The first notification that fits, old or new; None if none comes in time."""
        with self._news:
            self._news.wait_for(lambda: any(map(fits, self._notifications)), seconds)
            return next(filter(fits, self._notifications), None)


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(
        self, receiver: Receiver, request: socket.socket, address: tuple[str, int], server: socketserver.BaseServer
    ) -> None:
        self._receiver = receiver
        super().__init__(request, address, server)

    def do_POST(self) -> None:
        self._receiver.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: what was received is what counts."""


@contextmanager
def open_http(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """Serve HTTP on 127.0.0.1 in threads of this process; yields the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def open_receiver() -> Iterator[Receiver]:
    """Run a receiver of notifications."""
    receiver = Receiver()
    with open_http(partial(_Handler, receiver)) as port:
        receiver.port = port
        yield receiver
