"""Sockets that were passed on, at whatever fd: the protocol's 3 is taken in a process of tests."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from exporter.service.sockets import MAX_FDS, BadSocket, take_sockets

PID = 4242
BASE = 200


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pass_on(*fds: int) -> None:
    """Put these at BASE and after it, as a parent does; whoever takes them closes them."""
    for number, fd in enumerate(fds):
        os.dup2(fd, BASE + number, inheritable=True)


def make_environment(count: int | str, pid: int = PID, names: str = "") -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "HOME": "/"}


def test_sockets_that_listen_are_taken_and_the_variables_too(stack: ExitStack, tmp_path: Path) -> None:
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    unix = stack.enter_context(socket.socket(socket.AF_UNIX))
    unix.bind(str(tmp_path / "x.sock"))
    unix.listen()
    pass_on(tcp.fileno(), unix.fileno())
    environment = make_environment(2, names="http:local")
    taken = [stack.enter_context(sock) for sock in take_sockets(environment, PID, BASE)]
    assert [sock.getsockname() for sock in taken] == [tcp.getsockname(), unix.getsockname()]
    assert [(sock.fileno(), sock.getblocking()) for sock in taken] == [(BASE, False), (BASE + 1, False)]
    assert not any(os.get_inheritable(sock.fileno()) for sock in taken), "children would hold them"
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    "environment",
    [{}, make_environment(1, pid=PID + 1), make_environment("x"), make_environment(0), {"LISTEN_FDS": "1"}],
)
def test_what_is_for_somebody_else_is_left_alone(environment: dict[str, str]) -> None:
    assert take_sockets(environment, PID, BASE) == []
    assert "LISTEN_FDS" not in environment


def test_what_is_no_socket_that_listens_is_refused_by_name(stack: ExitStack, tmp_path: Path) -> None:
    plain = stack.enter_context((tmp_path / "file").open("w"))
    datagram = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    deaf = stack.enter_context(socket.socket())
    deaf.bind(("127.0.0.1", 0))
    for passed in (plain, datagram, deaf):
        pass_on(passed.fileno())
        with pytest.raises(BadSocket, match=rf"fd {BASE} of LISTEN_FDS \(http\)"):
            take_sockets(make_environment(1, names="http"), PID, BASE)
    with contextlib.suppress(OSError):
        os.close(BASE)
    with pytest.raises(BadSocket, match=r"fd 999 of LISTEN_FDS \(without a name\) is no socket: Bad file descriptor"):
        take_sockets(make_environment(1), PID, 999)


def test_thousands_are_refused_at_once() -> None:
    with pytest.raises(BadSocket, match=f"more than {MAX_FDS}"):
        take_sockets(make_environment(10**9), PID, BASE)
