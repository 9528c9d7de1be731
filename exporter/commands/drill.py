"""``drill``: let a running agent raise a stall that is not real."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import urllib.parse
from typing import Final

from exporter.stalls.drill import NoDrill
from exporter.web.listeners import Address, UnixAddress
from exporter.web.settings import DRILL_HEADER, DRILL_PATH


def run_drill(arguments: argparse.Namespace) -> int:
    """Let a running agent raise a drill; 0 if it does."""
    sys.stdout.write(f"{ask_for_drill(arguments.url, arguments.vm)}\n")
    return 0


CLIENT_SECONDS: Final = 30.0


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


def ask_for_drill(address: Address, vm: str) -> str:
    """Ask the agent at a Unix socket for a drill and return what it answers.

    Raises NoDrill where it refuses, OSError where it cannot be asked, ValueError for another kind of address.
    """
    if not isinstance(address, UnixAddress):
        raise ValueError(f"{address}: want unix:PATH, as the agent has to see who asks")
    connection = UnixConnection(address.path)
    try:
        connection.request("POST", f"{DRILL_PATH}?{urllib.parse.urlencode({'vm': vm})}", headers={DRILL_HEADER: "yes"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace").strip()
    except http.client.HTTPException as err:
        raise NoDrill(f"what answers at {address} is no agent: {err!r}") from err
    finally:
        connection.close()
    if answer.status != 200:
        raise NoDrill(f"the agent refuses ({answer.status}): {text}")
    return str(json.loads(text)["message"])
