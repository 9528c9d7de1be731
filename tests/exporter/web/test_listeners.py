"""Addresses as flags spell them, and what happens at the places they name."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.web.listeners import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    find_address,
    open_sockets,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9750", TcpAddress("", 9750)),
        ("127.0.0.1:9750", TcpAddress("127.0.0.1", 9750)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:9750", TcpAddress("::1", 9750)),
        ("[fe80::1%eth0]:65535", TcpAddress("fe80::1%eth0", 65535)),
        ("unix:/run/kvm notify.sock", UnixAddress("/run/kvm notify.sock")),
    ],
)
def test_address(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            "9750",
            "host",
            "host:",
            "host:port",
            ":65536",
            ":-1",
            ":\u0661",
            ":9750\n",
            "http://localhost:9750",
        ),
        *("::1:9750", "[::1]", "[]:1", "[a]:1", "[::1:9", "a]:1"),
        *("unix:", "unix:relative", "unix:/", "unix:/run/", "unix:/a\0b"),
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="listen address"):
        parse_address(text)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == address


def connect(address: Address, host: str | None = None) -> None:
    if isinstance(address, UnixAddress):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address.path)
    else:
        socket.create_connection((host or address.host, address.port), timeout=10).close()


def test_all_addresses_of_the_machine() -> None:
    with open_sockets([TcpAddress("", 0)]) as (sock,):
        address = find_address(sock)
        assert isinstance(address, TcpAddress)
        connect(address, "127.0.0.1")
        if sock.family == socket.AF_INET6:
            assert address.host == ""
            connect(address, "::1")


def test_several_addresses(tmp_path: Path) -> None:
    tcp = TcpAddress("127.0.0.1", 0)
    wanted: list[Address] = [tcp, tcp, UnixAddress(str(tmp_path / "a"))]
    with open_sockets(wanted) as sockets:
        for sock in sockets:
            connect(find_address(sock))
            assert not os.get_inheritable(sock.fileno())
        assert len(sockets) == 3
    assert {sock.fileno() for sock in sockets} == {-1}


def test_address_in_use_is_explained_and_nothing_stays_open() -> None:
    with open_sockets([TcpAddress("127.0.0.1", 0)]) as (sock,):
        taken = find_address(sock)
        with (
            pytest.raises(ListenError, match=f"cannot listen on {taken}: it is in use"),
            open_sockets([TcpAddress("127.0.0.1", 0), taken]),
        ):
            pass


def test_name_that_does_not_resolve_is_explained() -> None:
    with (
        pytest.raises(ListenError, match=r"cannot listen on no-such-host\.invalid:1: "),
        open_sockets([TcpAddress("no-such-host.invalid", 1)]),
    ):
        pass


def test_unix_socket_has_its_mode_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with open_sockets([UnixAddress(str(path))], unix_mode=0o640):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        connect(UnixAddress(str(path)))
    assert not path.exists()


def test_dead_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with open_sockets([UnixAddress(str(path))]):
        connect(UnixAddress(str(path)))


def test_living_unix_socket_is_left_alone(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "agent.sock"))
    with open_sockets([address]):
        with pytest.raises(ListenError, match="it is in use"), open_sockets([address]):
            pass
        connect(address)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_other_files_are_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    before = path.lstat()
    with pytest.raises(ListenError), open_sockets([UnixAddress(str(path))]):
        pass
    assert path.lstat().st_ino == before.st_ino


def test_socket_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with open_sockets([UnixAddress(str(path))]):
        path.rename(tmp_path / "old")
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.is_socket()


def test_socket_that_is_already_removed_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with open_sockets([UnixAddress(str(path))]):
        path.unlink()


def test_path_that_is_too_long_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="too long"), open_sockets([UnixAddress(f"{tmp_path}/{'x' * 200}")]):
        pass
