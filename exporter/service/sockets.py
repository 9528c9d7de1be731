"""Listening sockets that systemd has opened for the agent: sd_listen_fds(3).

They outlive the agent: while it is restarted, clients wait for the next one instead of being refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

FIRST_FD: Final = 3
MAX_FDS: Final = 64
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class BadSocket(OSError):
    """What was passed on is nothing that HTTP can be served at; the message says what is."""


def take_sockets(environment: MutableMapping[str, str], pid: int, first_fd: int = FIRST_FD) -> list[socket.socket]:
    """Return the sockets that were passed to this process, and take the variables away: they are not for children.

    Raises BadSocket where one of them cannot be listened on.
    """
    addressee, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if addressee != str(pid) or not (count.isascii() and count.isdigit()):
        return []
    if int(count) > MAX_FDS:
        raise BadSocket(f"LISTEN_FDS={count}: more than {MAX_FDS} sockets are not taken")
    return [_take(first_fd + i, names[i] if i < len(names) else "") for i in range(int(count))]


def _take(fd: int, name: str) -> socket.socket:
    told = f"fd {fd} of LISTEN_FDS ({name or 'without a name'})"
    try:
        sock = socket.socket(fileno=fd)
    except OSError as err:
        raise BadSocket(f"{told} is no socket: {err.strerror}") from err
    is_stream = sock.family in _FAMILIES and sock.type == socket.SOCK_STREAM
    if not is_stream or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise BadSocket(f"{told} is not a stream socket that listens: ListenStream= of a .socket makes one")
    os.set_inheritable(fd, False)
    sock.setblocking(False)
    return sock
