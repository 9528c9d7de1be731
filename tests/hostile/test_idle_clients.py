"""A thousand clients that ask once and stay: what they cost in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from tests.agents import connect_plain, open_agent
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
            client = stack.enter_context(closing(connect_plain(agent.port)))
            client.request("GET", "/metrics" if number % 2 else "/")
            assert client.getresponse().read() != b""
            assert agent.get("/-/healthy")[0] == 200
        sample = read_sample(agent, 0.0, 0.0, {})
        tell(
            f"{CLIENTS:,} idle clients of a document of {size >> 10} kB: agent at {sample.resident_kb >> 10} MB, "
            f"{sample.peak_kb >> 10} MB at most, {sample.fds} fds"
        )
        assert sample.peak_kb >> 10 < RESIDENT_MB
