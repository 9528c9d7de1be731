"""Clients from the network that an agent is better off without: ``WAY COUNT PORT``, one of the ways below.

======== ===========================================================================================================
idle     know the password, ask once, read all of the answer, stay; who is cut comes again after a while
slow     know the password, ask for a document and read a few bytes a second
guess    try passwords
drill    ask for drills without a password
exhaust  connect and say nothing, as many as can be
garbage  send what is no request, or half of one
======== ===========================================================================================================

Prints ``ready`` when all have begun, and at the end of its input what came of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, closing, suppress
from typing import Final

from exporter.web.settings import DRILL_HEADER, DRILL_PATH
from tests.hostile.held import Attack, open_attack
from tests.users import HEADERS

READ_BYTES: Final = 1 << 16
GARBAGE: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /metrics HTTP/1.1\r\nHost: test\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"BREW /metrics HTTP/1.1\r\nHost: test\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: a\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000\r\n\r\n" + b"a" * 100_000,
    b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 100,
    b"GET /metrics HTT",
    bytes(range(256)) * 16,
)


def build_request(path: str, method: str = "GET", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


class Clients:
    """What one way of attacking does; ``counts`` is what came of it."""

    def __init__(self, port: int) -> None:
        self.counts: Counter[str] = Counter()
        self._port = port
        self._random = random.Random(17)

    async def connect(self, number: int, receive_bytes: int = 0) -> socket.socket:
        """Connect from one of some hundred addresses of this host."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.bind((f"127.0.1.{1 + number % 250}", 0))
        self.counts["tries"] += 1
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def pause(self, seconds: float) -> None:
        """Wait about so long."""
        await asyncio.sleep(seconds * self._random.uniform(0.5, 1.5))

    async def ask(self, sock: socket.socket, request: bytes) -> int:
        """Ask and read the answer, whole; returns its status."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, request)
        head = b""
        while b"\r\n\r\n" not in head:
            piece = await loop.sock_recv(sock, READ_BYTES)
            if not piece:
                raise ConnectionResetError
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        left = length - len(body)
        while left > 0 and (piece := await loop.sock_recv(sock, READ_BYTES)):
            left -= len(piece)
        status = int(head[9:12])
        self.counts[str(status)] += 1
        return status

    async def idle(self, number: int) -> None:
        with closing(await self.connect(number)) as sock:
            await self.ask(sock, build_request("/metrics" if number % 2 else "/", **HEADERS))
            await asyncio.get_running_loop().sock_recv(sock, 1)
        self.counts["cut"] += 1
        await self.pause(60.0)

    async def slow(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        with closing(await self.connect(number, receive_bytes=2048)) as sock:
            await loop.sock_sendall(sock, build_request("/metrics", **HEADERS))
            while await loop.sock_recv(sock, 64):
                await asyncio.sleep(1.0)
        self.counts["cut"] += 1

    async def guess(self, number: int) -> None:
        password = base64.b64encode(f"test:{self._random.random()}".encode()).decode()
        with closing(await self.connect(number)) as sock:
            await self.ask(sock, build_request("/metrics", Authorization=f"Basic {password}"))
        await self.pause(1.0)

    async def drill(self, number: int) -> None:
        request = build_request(f"{DRILL_PATH}?vm=shop-1", "POST", **{DRILL_HEADER: "yes", "Content-Length": "0"})
        with closing(await self.connect(number)) as sock:
            await self.ask(sock, request)
        await self.pause(1.0)

    async def exhaust(self, number: int) -> None:
        with closing(await self.connect(number)) as sock:
            await asyncio.get_running_loop().sock_recv(sock, 1)
        self.counts["cut"] += 1
        await self.pause(1.0)

    async def garbage(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        with closing(await self.connect(number)) as sock:
            await loop.sock_sendall(sock, self._random.choice(GARBAGE))
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    while await loop.sock_recv(sock, READ_BYTES):
                        pass
        await self.pause(0.5)


async def attack(clients: Clients, way: Callable[[int], Awaitable[None]], number: int, start_seconds: float) -> None:
    """Be one client, again and again."""
    await asyncio.sleep(start_seconds)
    while True:
        try:
            await way(number)
        except OSError:  # it was cut at some other point, or nobody listens at the moment
            clients.counts["cut"] += 1
            await clients.pause(1.0)


async def run(way: str, count: int, port: int) -> Counter[str]:
    """Be so many clients until the end of the input; they begin over some seconds."""
    clients = Clients(port)
    loop = asyncio.get_running_loop()
    tasks = [
        loop.create_task(attack(clients, getattr(clients, way), number, 10.0 * number / count))
        for number in range(count)
    ]
    print("ready", flush=True)
    ended = loop.run_in_executor(None, sys.stdin.read)
    done, _running = await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
    for task in done & set(tasks):
        task.result()  # which raises what ended it
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return clients.counts


def open_clients(way: str, count: int, port: int) -> AbstractContextManager[Attack]:
    """Let so many clients attack in one of the ways."""
    return open_attack(way, [sys.executable, "-m", "tests.hostile.clients", way, str(count), str(port)])


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
