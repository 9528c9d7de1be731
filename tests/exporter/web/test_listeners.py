"""Addresses as flags spell them, and what happens at the places they name."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
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


def test_unix_socket_is_of_the_group_that_may_connect(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("giving a file to another group takes root")
    path, group = tmp_path / "agent.sock", 4242
    address = UnixAddress(str(path), gid=group)
    with open_sockets([address]) as (sock,):
        assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (group, 0o660)
        assert find_address(sock) == address
        assert str(address) == f"unix:{path}"


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


# A network namespace with IPv4 on lo only, and an /etc/hosts that knows localhost by both protocols, as Debian's does.
WITHOUT_IPV6 = """
set -e
mount --bind "$1" /etc/hosts
ip link set lo up
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
shift
exec "$@"
"""
LISTEN = """
import logging, sys
from exporter.web.listeners import find_address, open_sockets, parse_address
logging.basicConfig(format="%(message)s %(fields)s")
with open_sockets([parse_address(sys.argv[1])]) as sockets:
    print(*(find_address(sock) for sock in sockets))
"""


LISTEN_FOR_GROUP = """
import logging, sys
from exporter.web.listeners import UnixAddress, open_sockets
logging.basicConfig(format="%(message)s %(fields)s")
with open_sockets([UnixAddress(sys.argv[1], gid=4242)]):
    print("listens")
"""


def listen_without_ipv6(hosts: Path, address: str) -> subprocess.CompletedProcess[str]:
    without = ["--net", "--mount", "sh", "-c", WITHOUT_IPV6, "sh", str(hosts)]
    return run_in_user_namespace(*without, sys.executable, "-c", LISTEN, address)


def run_in_user_namespace(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command where we are root and know no other user or group; ``words`` begin with options of unshare."""
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", *words],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in run.stderr:
        pytest.skip(f"a user namespace cannot be had here: {run.stderr.strip()}")
    return run


def test_a_name_is_listened_on_as_far_as_the_machine_has_its_addresses(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
    run = listen_without_ipv6(hosts, "localhost:9750")
    assert (run.returncode, run.stdout) == (0, "127.0.0.1:9750\n"), run.stderr
    assert "one of the addresses of a name is not listened on" in run.stderr
    assert "[::1]:9750" in run.stderr


def test_a_name_without_an_address_here_is_an_error(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 ip6-localhost\n")
    run = listen_without_ipv6(hosts, "ip6-localhost:9750")
    assert run.returncode == 1
    assert "ListenError: cannot listen on ip6-localhost:9750: " in run.stderr
    assert listen_without_ipv6(hosts, "localhost:9750").stderr == ""


def test_a_group_that_cannot_be_given_the_socket_is_told(tmp_path: Path) -> None:
    run = run_in_user_namespace(sys.executable, "-c", LISTEN_FOR_GROUP, str(tmp_path / "agent.sock"))
    assert (run.returncode, run.stdout) == (0, "listens\n"), run.stderr
    assert "a group cannot be let connect" in run.stderr
    assert "SupplementaryGroups=" in run.stderr
