"""Clients that do not behave: what they get, and what they cost the log."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from exporter.logs.rate_limit import LINES, RateLimitedLog
from exporter.web.protocol import HttpProtocol
from kvm.log_limit import WINDOW_SECONDS
from tests.agents import open_agent

HEAD = b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n"
NONSENSE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"\x05\x01\x00",  # SOCKS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/x\r\nHost: a\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    b"G@\x80T / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /-/healthy HTTP/1.1\nHost: a\n\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"<script>" * 2_000 + b"\r\n\r\n",
    HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
    HEAD + b"no colon\r\n\r\n",
    HEAD + b"X : a\r\n\r\n",
    HEAD + b"X: a\0b\r\n\r\n",
    HEAD + b"X: a\rb\r\n\r\n",
    HEAD + b"X: a\r\n b\r\n\r\n",
    HEAD + b"\xc3\xa9: y\r\n\r\n",
    HEAD + b"Content-Length: a\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: nonsense\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
    HEAD + b"\r\nGARBAGE\r\n\r\n",
    b"\r\n\r\nGARBAGE\r\n\r\n",
]
# What the aiohttp of a Debian takes for a request, or closes without an answer.
TAKEN_BY_OLDER = {
    b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /-/healthy HTTP/1.1\nHost: a\n\n",
    HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
    HEAD + b"X : a\r\n\r\n",
    HEAD + b"X: a\r\n b\r\n\r\n",
}
IS_OLDER = tuple(map(int, aiohttp.__version__.split(".")[:2])) < (3, 14)
MALFORMED = [nonsense for nonsense in NONSENSE if not (IS_OLDER and nonsense in TAKEN_BY_OLDER)]


def test_a_handful_of_lines_a_minute_and_a_count_of_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    rate_limited_log = RateLimitedLog(lambda: now[0])
    for number in range(100):
        rate_limited_log.write(logging.WARNING, "too slow", client=number)
    rate_limited_log.write(logging.WARNING, "something else")
    assert [record.message for record in caplog.records] == ["too slow"] * LINES + ["something else"]
    now[0] += WINDOW_SECONDS
    rate_limited_log.write(logging.WARNING, "too slow", client=100)
    assert caplog.records[-1].__dict__["fields"] == {"client": 100, "withheld": 100 - LINES}
    rate_limited_log.write(logging.WARNING, "too slow", client=101)
    assert "withheld" not in caplog.records[-1].__dict__["fields"]


def open_protocol(writer: object) -> tuple[HttpProtocol, web.BaseRequest]:
    """The server's side of a connection, and a request on it of which so much has been written."""
    request = SimpleNamespace(transport=None, writer=writer)
    protocol = HttpProtocol(web.Server(lambda _request: None), RateLimitedLog())  # type: ignore[arg-type, return-value]
    return protocol, request  # type: ignore[return-value]


def test_what_fails_on_a_connection_is_one_line_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        protocol, _request = open_protocol(None)
        protocol.log_exception("Unhandled exception", exc_info=ValueError("odd"))

    asyncio.run(scenario())
    (line,) = [record for record in caplog.records if record.name == "exporter.logs.rate_limit"]
    assert (line.message, line.exc_info) == ("serving a connection failed", None)
    assert line.__dict__["fields"]["err"] == "ValueError('odd')"


def test_no_second_answer_is_written_into_another() -> None:
    async def scenario() -> None:
        protocol, request = open_protocol(SimpleNamespace(output_size=10))
        with pytest.raises(ConnectionError):
            protocol.handle_error(request, 500, ValueError())
        protocol, request = open_protocol(SimpleNamespace(output_size=0))
        assert protocol.handle_error(request, 400, ValueError()).status == 400

    asyncio.run(scenario())


def ask(port: int, data: bytes) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        try:
            client.sendall(data)
            while block := client.recv(65536):
                answer += block
        except (ConnectionError, BrokenPipeError):
            pass
    return answer


def test_a_thousand_malformed_requests_cost_the_real_agent_a_few_lines(tell: Callable[[str], None]) -> None:
    refused: Counter[bytes] = Counter()
    with open_agent(command="demo") as agent:
        before = len("\n".join(agent.log))
        for number in range(1000):
            nonsense = MALFORMED[number % len(MALFORMED)]
            answer = ask(agent.port, nonsense)
            refused[nonsense] += b" 400 " in answer  # where it comes before all is sent, the answer may be lost
            assert answer == b"" or b" 400 " in answer
            assert not re.search(rb"(?i)python|aiohttp|traceback|script", answer)
            for head in re.findall(rb"HTTP/1.[01] .*?\r\n\r\n", answer, re.DOTALL):
                assert b"\r\nServer: kvm-notify-exporter\r\n" in head
        assert agent.get("/-/healthy")[0] == 200
    lines = [line for line in agent.log if "malformed" in line]
    grown = len("\n".join(agent.log)) - before
    assert all(refused[nonsense] for nonsense in MALFORMED)
    assert 1 <= len(lines) <= 2 * LINES
    assert not any("Traceback" in line for line in agent.log)
    assert grown < 10_000
    tell(
        f"1,000 malformed requests of {len(MALFORMED)} kinds: {refused.total()} answers of 400, {len(lines)} lines, "
        f"the log grew by {grown} bytes"
    )
