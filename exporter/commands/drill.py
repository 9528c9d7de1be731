"""``drill``: let a running agent raise a stall that is not real."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse

from exporter.commands.agent_socket import ask_agent
from exporter.stalls.drill import NoDrill
from exporter.web.listeners import Address
from exporter.web.settings import DRILL_HEADER, DRILL_PATH


def run_drill(arguments: argparse.Namespace) -> int:
    """Let a running agent raise a drill; 0 if it does."""
    sys.stdout.write(f"{ask_for_drill(arguments.url, arguments.vm)}\n")
    return 0


def ask_for_drill(address: Address, vm: str) -> str:
    """Ask the agent at a Unix socket for a drill and return what it answers.

    Raises NoDrill where it refuses, AgentUnreachable, and ValueError for another kind of address.
    """
    target = f"{DRILL_PATH}?{urllib.parse.urlencode({'vm': vm})}"
    answer = ask_agent(address, "POST", target, {DRILL_HEADER: "yes"})
    if answer.status != 200:
        raise NoDrill(f"the agent refuses ({answer.status}): {answer.text}")
    return str(json.loads(answer.text)["message"])
