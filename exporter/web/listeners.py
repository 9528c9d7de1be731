"""Where the agent listens: addresses as flags spell them, and their sockets."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

BACKLOG: Final = 128
UNIX_MODE: Final = 0o660
_TCP = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\[\]:]*):(?P<port>[0-9]{1,5})", re.ASCII)
# The machine has no such address, nor such a protocol: IPv6 is switched off.
_NOT_HERE: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})


class ListenError(OSError):
    """An address cannot be listened on; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host (name or number, "" for all of this machine's) and a port (0 for any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a Unix socket, and the group whose members may connect to it; None for that of the agent."""

    path: str
    gid: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Parse ``:9750``, ``127.0.0.1:9750``, ``name:9750``, ``[::1]:9750`` or ``unix:/run/x.sock``.

    Raises ValueError with a message for the person who wrote it.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise ValueError(f"listen address {text!r}: after unix: there must be an absolute path of a socket")
        return UnixAddress(path)
    found = _TCP.fullmatch(text)
    if not found:
        raise ValueError(f"listen address {text!r}: want host:port, :port, [ipv6]:port or unix:/path")
    port = int(found["port"])
    if port > 65535:
        raise ValueError(f"listen address {text!r}: a port is at most 65535")
    host = found["host"].strip("[]")
    if found["host"].startswith("[") and ":" not in host:
        raise ValueError(f"listen address {text!r}: only an IPv6 address stands in brackets")
    return TcpAddress(host, port)


@contextmanager
def open_sockets(addresses: Sequence[Address], unix_mode: int = UNIX_MODE) -> Iterator[list[socket.socket]]:
    """Open listening sockets, one or more for each address, and close them in the end; Unix sockets are removed too.

    Raises ListenError.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for address in addresses:
            try:
                if isinstance(address, UnixAddress):
                    opened = [_open_unix(address, unix_mode, stack.callback)]
                else:
                    opened = _open_tcp(address)
            except OSError as err:
                raise ListenError(f"cannot listen on {address}: {_explain(err)}") from err
            for sock in opened:
                stack.enter_context(sock)
                sock.setblocking(False)
            sockets += opened
        yield sockets


def find_address(sock: socket.socket) -> Address:
    """Find out where a socket listens: with port 0, the kernel chose."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return UnixAddress(os.fsdecode(name))
    host = "" if name[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) else name[0]
    return TcpAddress(host, name[1])


def _open_tcp(address: TcpAddress) -> list[socket.socket]:
    if not address.host:
        try:
            return [_listen(socket.AF_INET6, ("::", address.port), dual=True)]
        except OSError as err:
            if err.errno not in _NOT_HERE:
                raise
            return [_listen(socket.AF_INET, ("0.0.0.0", address.port))]
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets, missing = list[socket.socket](), dict[TcpAddress, OSError]()
    with ExitStack() as undo:
        for family, name in dict.fromkeys((item[0], item[4]) for item in found):
            try:
                sockets.append(undo.enter_context(_listen(family, name)))
            except OSError as err:
                if err.errno not in _NOT_HERE:
                    raise
                missing[TcpAddress(str(name[0]), address.port)] = err
        if not sockets:
            raise next(iter(missing.values()))
        undo.pop_all()
    # /etc/hosts has an IPv6 address for localhost also where IPv6 is off.
    for absent, problem in missing.items():
        fields = {"name": address.host, "address": str(absent), "err": problem.strerror}
        log.warning("one of the addresses of a name is not listened on", extra={"fields": fields})
    return sockets


def _listen(family: int, name: tuple[object, ...], *, dual: bool = False) -> socket.socket:
    with ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual))
        sock.bind(name)
        sock.listen(BACKLOG)
        undo.pop_all()
    return sock


def _open_unix(address: UnixAddress, mode: int, on_close: Callable[..., object]) -> socket.socket:
    """Open a Unix socket; the file of a dead one is replaced, anything else at its path is left alone."""
    path = Path(address.path)
    with ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            sock.bind(str(path))
        except OSError as err:
            if err.errno != errno.EADDRINUSE or not _is_dead_socket(path):
                raise
            path.unlink()
            sock.bind(str(path))
        made = path.lstat()
        # Nobody can connect before listen(), so there is no moment with the wrong group or mode.
        if address.gid is not None:
            _give_to_group(path, address.gid)
        path.chmod(mode)
        sock.listen(BACKLOG)
        undo.pop_all()
    on_close(_remove_unix, path, (made.st_dev, made.st_ino))
    return sock


def _give_to_group(path: Path, gid: int) -> None:
    """Let a group connect; without CAP_CHOWN an agent may do so for groups that it is a member of."""
    try:
        os.chown(path, -1, gid)
    except OSError as err:
        fields = {"path": str(path), "gid": gid, "err": err.strerror}
        remedy = "run the agent with that group besides its own (SupplementaryGroups= of the unit)"
        log.warning("a group cannot be let connect", extra={"fields": fields | {"remedy": remedy}})


def _is_dead_socket(path: Path) -> bool:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _remove_unix(path: Path, identity: tuple[int, int]) -> None:
    """Remove a socket file, unless another agent has put its own there."""
    try:
        found = path.lstat()
        if (found.st_dev, found.st_ino) == identity:
            path.unlink()
    except FileNotFoundError:
        return


def _explain(err: OSError) -> str:
    if err.errno == errno.EADDRINUSE:
        return "it is in use; stop the program that uses it (ss -lptx shows it), or choose another address"
    if err.errno == errno.EACCES:
        return "not permitted; choose another address, or run with more rights"
    return err.strerror or str(err)
