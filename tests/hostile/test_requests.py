"""Requests that are too slow, too large or too many, at the real agent: memory stays, and scrapes go on meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from exporter.web.connection_guard import FIRST_REQUEST_SECONDS
from exporter.web.protocol import MAX_WAITING_REQUESTS
from exporter.web.settings import DRILL_PATH
from tests.agents import AgentProcess, open_agent
from tests.hostile.siege import read_sample

DRIPS = 200
BODIES, PIECE_BYTES, PIECES = 200, 1 << 20, 64
HEAD_BYTES, HEADS = 10 << 20, 300
PIPELINED = 26_000
CONNECTIONS = 15_000
GROWN_MB = 12
# A scraper waits for 10.
SCRAPE_SECONDS = 5.0

GET = b"GET /-/healthy HTTP/1.1\r\nHost: test\r\n"
POST = f"POST {DRILL_PATH}?vm=web HTTP/1.1\r\nHost: test\r\n".encode()


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with open_agent(command="demo") as running:  # whose host is always the same, whatever else is tested
        for _ in range(20):  # what it keeps of its own it has by then
            running.get()
        yield running


@contextmanager
def measure(
    agent: AgentProcess, tell: Callable[[str], None], what: Callable[[], str], grown_mb: float = GROWN_MB
) -> Iterator[None]:
    """Scrape all the while, and hold time, memory and fds to their bounds at the end."""
    seconds, failures, ended = list[float](), list[object](), threading.Event()

    def scrape() -> None:
        while not seconds or not ended.wait(0.2):
            began = time.monotonic()
            try:
                status, _headers, _body = agent.get()
            except OSError as err:
                failures.append(err)
            else:
                seconds.append(time.monotonic() - began)
                if status != 200:
                    failures.append(status)

    Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # the peak begins anew (Documentation/filesystems/proc.rst)
    before, thread = read_sample(agent, 0.0, 0.0, {}), threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    after = read_sample(agent, 0.0, 0.0, {})
    grown = (after.peak_kb - before.resident_kb) / 1024
    tell(
        f"{what()}: {len(seconds)} scrapes meanwhile, {len(failures)} failed, {max(seconds):.2f} s at most, "
        f"{max(0.0, grown):.1f} MB more at most"
    )
    assert seconds
    assert failures == []
    assert max(seconds) < SCRAPE_SECONDS
    assert grown < grown_mb
    assert not any("Traceback" in line for line in agent.log)


def connect(agent: AgentProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", agent.port), timeout=30)


def send_until_cut(client: socket.socket, pieces: Iterator[bytes]) -> int:
    """Send as much as is taken; returns how many bytes that were."""
    sent = 0
    with suppress(OSError):
        for piece in pieces:
            client.sendall(piece)
            sent += len(piece)
    return sent


def read_to_the_end(client: socket.socket) -> bytes:
    answer = b""
    with suppress(OSError):
        while block := client.recv(1 << 16):
            answer += block
    return answer


@pytest.mark.parametrize(
    ("start", "drip"),
    [(GET, b"X: y\r\n"), (POST + b"Content-Length: 1000000000\r\n\r\n", b"y")],
    ids=["headers", "bodies"],
)
def test_slow_requests_are_cut(start: bytes, drip: bytes, agent: AgentProcess, tell: Callable[[str], None]) -> None:
    living = set[socket.socket]()
    with ExitStack() as stack, measure(agent, tell, lambda: f"{DRIPS} clients that drip {drip!r}"):
        for _ in range(DRIPS):
            client = stack.enter_context(connect(agent))
            client.sendall(start)
            living.add(client)
        until = time.monotonic() + FIRST_REQUEST_SECONDS + 5
        while living and time.monotonic() < until:
            for client in tuple(living):
                try:
                    client.sendall(drip)
                except OSError:
                    living.discard(client)
            time.sleep(0.2)  # that is the attack
    assert not living


def test_bodies_are_not_kept(agent: AgentProcess, tell: Callable[[str], None]) -> None:
    piece, taken = b"y" * PIECE_BYTES, 0
    kinds = {
        b"Content-Length: 100000000000\r\n\r\n": piece,
        b"Transfer-Encoding: chunked\r\n\r\n": b"%x\r\n%s\r\n" % (PIECE_BYTES, piece),
    }
    offered = BODIES * PIECES * PIECE_BYTES >> 20
    with measure(agent, tell, lambda: f"{offered:,} MiB of bodies offered, {taken >> 20:,} MiB taken"):
        for _ in range(BODIES // len(kinds)):
            for head, part in kinds.items():
                with connect(agent) as client:
                    client.sendall(POST + head)
                    taken += send_until_cut(client, (part for _ in range(PIECES)))


def test_heads_without_end_are_refused(agent: AgentProcess, tell: Callable[[str], None]) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    kinds = (
        (GET, b"X: " + b"y" * (1 << 16)),
        (GET, b"X: y\r\n" * (1 << 13)),
        (GET + upgrade, b"y" * (1 << 16)),
        (b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n", b"y" * (1 << 16)),
    )
    taken = 0
    with measure(agent, tell, lambda: f"{HEADS} heads of {HEAD_BYTES >> 20} MiB, {taken >> 10} kB taken of each"):
        for number in range(HEADS):
            start, piece = kinds[number % len(kinds)]
            with connect(agent) as client:
                client.sendall(start)
                taken = max(taken, send_until_cut(client, (piece for _ in range(HEAD_BYTES // len(piece)))))
                read_to_the_end(client)
    assert taken < HEAD_BYTES


def test_26000_pipelined_requests_are_answered_or_cut(agent: AgentProcess, tell: Callable[[str], None]) -> None:
    answers, requests = 0, [GET + b"\r\n"] * (PIPELINED - 1) + [GET + b"Connection: close\r\n\r\n"]
    with (
        measure(agent, tell, lambda: f"{PIPELINED:,} pipelined requests, {answers:,} answers"),
        connect(agent) as client,
    ):
        sender = threading.Thread(target=send_until_cut, args=(client, iter(requests)))
        sender.start()
        answers = read_to_the_end(client).count(b"HTTP/1.1 200 ")
        sender.join()
    assert answers in (PIPELINED, *range(MAX_WAITING_REQUESTS))  # aiohttp reads no further than it answers since 3.14


def test_who_pipelines_and_reads_nothing_is_not_read_either(agent: AgentProcess, tell: Callable[[str], None]) -> None:
    taken, offers, requests = 0, 2600, b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n" * 100
    with (
        measure(agent, tell, lambda: f"{taken:,} bytes of pipelined requests taken of who reads no answer"),
        connect(agent) as client,
    ):
        client.settimeout(2.0)
        taken = send_until_cut(client, (requests for _ in range(offers)))
    assert taken < offers * len(requests)


def test_connections_that_come_and_go_leave_nothing(agent: AgentProcess, tell: Callable[[str], None]) -> None:
    with measure(agent, tell, lambda: f"{CONNECTIONS:,} connections, one after the other", 4.0):
        for _ in range(CONNECTIONS):
            with connect(agent) as client:
                client.sendall(GET + b"Connection: close\r\n\r\n")
                assert read_to_the_end(client).startswith(b"HTTP/1.1 200 ")
