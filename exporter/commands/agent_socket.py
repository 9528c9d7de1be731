"""Asks the agent that runs on this host, at its Unix socket: there the kernel tells it who asks."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
from collections.abc import Mapping
from typing import Final, NamedTuple

from exporter.web.listeners import Address, UnixAddress

CLIENT_SECONDS: Final = 30.0
MAX_ANSWER_BYTES: Final = 64 << 20
_NOT_THERE: Final = (errno.ENOENT, errno.ECONNREFUSED)


class AgentUnreachable(OSError):
    """No agent answers at an address; the message says what to do."""


class Answer(NamedTuple):
    """What an agent has answered: an HTTP status and a text."""

    status: int
    text: str


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CLIENT_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CLIENT_SECONDS)
        self.sock.connect(self._path)


def ask_agent(address: Address, method: str, target: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Send one request; raises AgentUnreachable, and ValueError for an address that is no Unix socket."""
    if not isinstance(address, UnixAddress):
        raise ValueError(f"{address}: want unix:PATH, as the agent has to see who asks")
    with contextlib.closing(UnixConnection(address.path)) as connection:
        try:
            connection.request(method, target, headers=dict(headers or {}))
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER_BYTES + 1)
        except http.client.HTTPException as err:
            raise AgentUnreachable(f"what answers at {address} is no agent: {err!r}") from err
        except OSError as err:
            raise AgentUnreachable(f"no agent answers at {address}: {_explain(err)}") from err
    if len(body) > MAX_ANSWER_BYTES:
        raise AgentUnreachable(f"what answers at {address} is no agent: it answers without end")
    return Answer(answer.status, body.decode(errors="replace").strip())


def _explain(err: OSError) -> str:
    what = err.strerror or str(err)
    if err.errno in _NOT_THERE:
        return f"{what}; start it (systemctl start kvm-notify-exporter), or name the socket that it has (unix:PATH)"
    if err.errno in (errno.EACCES, errno.EPERM):
        return f"{what}; ask as root, or as a member of its --web.details-group"
    return f"{what}; its log says more"
