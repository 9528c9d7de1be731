"""A thousand clients that ask once and stay: what they cost in memory."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

from tests.agents import open_agent
from tests.hostile.clients import READ_BYTES, build_request
from tests.hostile.siege import read_sample
from tests.hostile.vm_flood import open_flood

CLIENTS = 1000
VMS = 40
PROCESSES = 12
RESIDENT_MB = 100


def test_1000_idle_clients_stay_under_100_mb(tell: Callable[[str], None]) -> None:
    with open_flood(PROCESSES, VMS, 65534), open_agent() as agent, ExitStack() as stack:
        size = len(agent.get()[2])
        for number in range(CLIENTS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", agent.port), timeout=60))
            client.sendall(build_request("/metrics" if number % 2 else "/"))
            while len(client.recv(READ_BYTES)) > 10:  # to the end, or nearly; some are cut before
                client.settimeout(0.05)
                if not _is_more(client):
                    break
                client.settimeout(60)
            assert agent.get("/-/healthy")[0] == 200
        sample = read_sample(agent, 0.0, 0.0, {})
        tell(
            f"{CLIENTS:,} idle clients of a document of {size >> 10} kB: agent at {sample.resident_kb >> 10} MB, "
            f"{sample.peak_kb >> 10} MB at most, {sample.fds} fds"
        )
        assert sample.peak_kb >> 10 < RESIDENT_MB


def _is_more(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
