"""A service manager that only listens: what systemd is to the agent, for tests that need no systemd."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import PATIENCE_SECONDS


class ListeningManager:
    """Takes datagrams of sd_notify(3), and keeps all of them; made by `open_manager`."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self.told: list[dict[str, str]] = []
        self._socket = sock

    def take(self) -> dict[str, str]:
        """The next message; raises TimeoutError where none comes."""
        text = self._socket.recv(65536).decode()
        message = dict(line.split("=", 1) for line in text.split("\n"))
        self.told.append(message)
        return message

    def take_until(self, **wanted: str) -> dict[str, str]:
        """The first message that says all of this."""
        while not wanted.items() <= (message := self.take()).items():
            continue
        return message

    def take_waiting(self) -> list[dict[str, str]]:
        """All messages that have come."""
        taken = list[dict[str, str]]()
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                taken.append(self.take())
        self._socket.settimeout(PATIENCE_SECONDS)
        return taken


@contextlib.contextmanager
def open_manager(address: str = "") -> Iterator[ListeningManager]:
    """Listen at a path, or at an abstract address (``@name``)."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        address = address or str(Path(directory) / "notify")
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(PATIENCE_SECONDS)
        yield ListeningManager(sock, address)
