"""Who is at the other end of a Unix socket: real processes of other users and groups."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from exporter.web.peer_credentials import Peer, TrustedPeers, read_peer

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'x'); s.recv(1)"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


def read_peer_of(tmp_path: Path, uid: int, gid: int, groups: Iterable[int] = ()) -> Peer:
    """What the kernel says of a process of this user that connects."""
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o666)
        listening.listen(1)
        words = ["/usr/bin/python3", "-I", "-c", CONNECT, str(tmp_path / "socket")]
        with subprocess.Popen(words, user=uid, group=gid, extra_groups=list(groups)):
            client, _ = listening.accept()
            with client:
                assert client.recv(1) == b"x"
                return read_peer(client)


def test_of_this_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = read_peer(ours)
        assert peer.uid == os.geteuid()
        assert peer.gids == {os.getegid(), *os.getgroups()}


@needs_root
def test_of_another_user_with_any_number_of_groups(tmp_path: Path) -> None:
    assert read_peer_of(tmp_path, 65534, 1001) == Peer(65534, frozenset({1001}))
    (tmp_path / "socket").unlink()
    many = list(range(2000, 2200))
    assert read_peer_of(tmp_path, 65534, 1001, many) == Peer(65534, frozenset({1001, *many}))
    (tmp_path / "socket").unlink()
    assert read_peer_of(tmp_path, 65534, 1001, range(2000, 3000)) == Peer(65534, frozenset({1001}))


@pytest.mark.parametrize(
    ("peer", "is_trusted"),
    [
        (Peer(0, frozenset({0})), True),
        (Peer(990, frozenset({990})), True),
        (Peer(1000, frozenset({1000, 4})), True),
        (Peer(1000, frozenset({1000})), False),
        (Peer(1000, frozenset({0, 990})), False),  # root's group is not root
    ],
)
def test_who_is_trusted(peer: Peer, is_trusted: bool) -> None:
    assert TrustedPeers(990, 4).holds(peer) is is_trusted
    assert not TrustedPeers(990).holds(Peer(1000, frozenset({4})))
