"""What connections cost before HTTP begins: half-open handshakes, fds that run out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from exporter.logs.rate_limit import LINES, RateLimitedLog
from exporter.web.acceptor import Acceptor
from exporter.web.tls import ServerContext, load_context
from exporter.web.web_config import parse_web_config
from tests.certificates import Authority
from tests.waiting import PATIENCE_SECONDS

HELLO = b"hello\n"


class Greeter(asyncio.Protocol):
    """Says hello and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(HELLO)
        transport.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    authority.issue("server", "DNS:localhost")
    return authority


@pytest.fixture
def context(authority: Authority) -> ServerContext:
    text = b"tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
    tls = parse_web_config(text, authority.directory / "web.yml").tls
    assert tls is not None
    return load_context(tls)


@asynccontextmanager
async def open_acceptor(context: ssl.SSLContext | None, *bounds: float) -> AsyncIterator[int]:
    """Greet on a port; ``bounds`` are how many handshakes there may be, and for how long."""
    most, seconds = int(bounds[0]) if bounds else 64, bounds[1] if len(bounds) > 1 else 10.0
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        listening.setblocking(False)
        acceptor = Acceptor(Greeter, lambda: context, RateLimitedLog(), most, seconds)
        acceptor.start([listening])
        try:
            yield listening.getsockname()[1]
        finally:
            await acceptor.close()


async def greet(port: int, context: ssl.SSLContext | None) -> bytes:
    name = "localhost" if context else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def connect(port: int, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_and_with_tls(authority: Authority, context: ServerContext) -> None:
    async def main() -> None:
        async with open_acceptor(None) as port:
            assert await greet(port, None) == HELLO
        async with open_acceptor(context) as port:
            assert await asyncio.gather(*(greet(port, authority.trust()) for _ in range(20))) == [HELLO] * 20

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))


def test_a_handshake_that_does_not_come_is_given_up(context: ServerContext) -> None:
    async def main() -> None:
        async with open_acceptor(context, 64, 0.2) as port:
            reader, writer = await connect(port)
            writer.write(b"\x16\x03\x01")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))


def test_half_open_handshakes_are_bounded_and_hold_nobody_up(
    authority: Authority, context: ServerContext, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with open_acceptor(context, 16) as port:
            clients = [await connect(port, "127.0.0.2") for _ in range(200)]
            for _ in range(20):
                assert await greet(port, authority.trust()) == HELLO
            # The clients' own, those that wait, and what the test and asyncio have besides.
            assert len(os.listdir("/proc/self/fd")) <= before + 200 + 16 + 10
            for _reader, writer in clients:
                writer.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    assert 1 <= len(caplog.records) <= LINES
    assert vars(caplog.records[0])["fields"] == {"client": "127.0.0.2", "limit": 16}


def test_the_client_with_the_most_handshakes_pays(authority: Authority, context: ServerContext) -> None:
    async def main() -> None:
        async with open_acceptor(context, 8) as port:
            patient = await connect(port, "127.0.0.3")  # longest of all, and alone
            crowd = [await connect(port, "127.0.0.2") for _ in range(50)]
            assert await greet(port, authority.trust()) == HELLO
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(patient[0].read(), 0.2)
            cut = 0
            for reader, _writer in crowd:
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(), 0.01)
                cut += reader.at_eof() or reader.exception() is not None
            assert cut >= 43
            for _reader, writer in (patient, *crowd):
                writer.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))


def test_fds_that_run_out_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        async with open_acceptor(None) as port:
            waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
            os.close(lowest_free := os.dup(0))  # the next one that the kernel would give
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                began = os.times()
                await asyncio.sleep(0.5)
                spent = os.times()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert spent.user + spent.system - began.user - began.system < 0.3
            for client in waiting:  # they are accepted as soon as there are fds again
                client.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(client, 100) == HELLO
                client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert vars(caplog.records[0])["fields"]["err"] == "Too many open files"
