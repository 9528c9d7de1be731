"""``drill``: let a running agent raise a stall that is not real."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse

from exporter.commands.agent_socket import AgentUnreachable, ask_agent
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
    try:
        return parse_message(answer.text)
    except ValueError as err:
        raise AgentUnreachable(f"what answers at {address} is no agent of this version: {err}") from err


def parse_message(text: str) -> str:
    """Return what an agent says of a drill that it has begun; raises ValueError where it is none's of this version."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as err:
        raise ValueError(repr(err)) from err
