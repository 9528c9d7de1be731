"""How many connections there may be. What the guard cuts, ``test_server`` has."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack

import pytest

from exporter.web.connection_guard import find_limits
from tests.agents import open_agent


@pytest.mark.parametrize(
    ("fds", "limits"),
    [(resource.RLIM_INFINITY, (512, 64)), (65536, (512, 64)), (1024, (512, 64)), (256, (128, 32)), (1, (1, 1))],
)
def test_half_of_all_fds_at_most_are_connections(fds: int, limits: tuple[int, int]) -> None:
    assert find_limits(fds) == limits


@pytest.mark.parametrize("fds", [64, 256])
def test_an_agent_whose_fds_are_used_up_goes_on_and_writes_little(fds: int) -> None:
    prefix = ["sh", "-c", f'ulimit -n {fds} && exec "$@"', "sh"]
    with open_agent(command="demo", prefix=prefix) as agent, ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", agent.port), timeout=30))
        for _ in range(20):
            assert agent.get()[0] == 200
        assert len(agent.fds()) < fds
        assert len(agent.log) < 25
