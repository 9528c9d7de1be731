"""Who is at the other end of a Unix socket, as the kernel has noted it when the connection was made (unix(7))."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

_UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
# include/uapi/asm-generic/socket.h; not in Python's socket module.
_SO_PEERGROUPS: Final = 59
_GID: Final = struct.Struct("=I")
# Python's getsockopt takes no more than 1,024 bytes.
_MAX_GROUPS: Final = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """A process's user and groups."""

    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class TrustedPeers:
    """Root, the agent's own user, and the members of a group if one was named."""

    uid: int
    gid: int | None = None

    def holds(self, peer: Peer) -> bool:
        """Tell whether a peer is one of them."""
        return peer.uid in (0, self.uid) or (self.gid is not None and self.gid in peer.gids)


def read_peer(sock: socket.socket) -> Peer:
    """Ask the kernel who has connected; of a process with over 256 groups only the first counts. Raises OSError."""
    _pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS * _GID.size)
    except OSError as err:
        if err.errno != errno.ERANGE:
            raise
        groups = b""
    return Peer(uid, frozenset({gid, *(number for (number,) in _GID.iter_unpack(groups))}))
