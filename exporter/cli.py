"""Flags, wiring, signals: the only place that knows everybody.

Flags are spelled as node_exporter's. Without a command the program serves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.build_info import NAME, read_version
from exporter.commands.check import run_check
from exporter.commands.drill import run_drill
from exporter.commands.once import run_once
from exporter.commands.serve import run_server
from exporter.flag_values import WrongUsage, parse_prom_path
from exporter.flags import (
    add_collector_flags,
    add_drill_flags,
    add_from_agent_flag,
    add_log_flags,
    add_monitor_flags,
    add_path_flags,
    add_source_flags,
    add_state_flag,
    add_stats_flag,
    add_top_flags,
    add_web_config_flag,
    add_web_flags,
)
from exporter.logs import journal
from exporter.logs.formatters import start_logging
from kvm.identity.vm_ids import AGENT_COMM

log = logging.getLogger(__name__)

COMMANDS = {
    "serve": "serve metrics over HTTP (the default)",
    "once": "print one snapshot of the host and exit",
    "top": "show what all VMs do, live in a terminal: the rate of every statistic that KVM keeps",
    "check": "explain what works on this host, what does not, and why",
    "demo": "serve a simulated host, to see what there is to see",
    "drill": "let a running agent raise a stall that is not real, to test who is called",
}
# Each VM is held by one pidfd; the rest is for sockets and what one snapshot opens and closes.
WANTED_FDS = 65536
# As argparse's, and as the unit's RestartPreventExitStatus= has it.
WRONG_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command's flags."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Prometheus exporter for KVM notify VM exits: every vCPU, every VMM, with its owner.",
        epilog=f"'{NAME} serve --help' shows the flags of serve, and so on.",
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {read_version() or 'not installed'}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_log_flags(command, "info" if name in ("serve", "demo") else "warn")
        if name == "check":
            add_web_config_flag(command, "check only this file of serve's, and all that it names")
        if name == "drill":
            add_drill_flags(command)
            continue
        if name != "demo":
            add_source_flags(command)
            add_path_flags(command)
        if name == "top":
            add_top_flags(command)
            continue
        add_collector_flags(command)
        if name in ("serve", "demo"):
            add_monitor_flags(command, of_this_host=name == "serve")
            add_web_flags(command)
        if name == "serve":
            add_state_flag(command)
        if name == "once":
            form = command.add_mutually_exclusive_group()
            form.add_argument("--format", choices=("prometheus", "json", "table"), help="(default: table)")
            form.add_argument(
                "--output", metavar="FILE.prom", type=parse_prom_path, help="write metrics to this file, all at once"
            )
            add_from_agent_flag(command)
            add_stats_flag(command)
    return parser


def raise_fd_limit() -> None:
    """Raise the soft limit of open files to what a host full of VMs needs, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FDS if hard == resource.RLIM_INFINITY else min(WANTED_FDS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_missing_streams() -> None:
    """Put something in the place of standard streams that whoever started us has closed.

    Else the next socket has the number of stderr, and what a library writes there goes to a client. A log that has
    nowhere to go is lost; output that has nowhere to go is an error (EBADF), because it was asked for.
    """
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def parse_command_line(words: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for; exits with 2 for a wrong one, as argparse does."""
    names_command = words and (not words[0].startswith("-") or words[0] in ("-h", "--help", "--version"))
    return build_parser().parse_args(words if names_command else ["serve", *words])


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    open_missing_streams()
    try:
        return run_command(sys.argv[1:] if words is None else words)
    except BrokenPipeError:  # whoever read our output has seen enough
        discard_output()
        return 0
    except OSError as err:  # --help or --version could not be written
        discard_output()
        sys.stderr.write(f"{NAME}: {err}\n")
        return 1


def discard_output() -> None:
    """Let what is still to be written to stdout go nowhere, instead of failing once more while Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return what runs a command."""
    if name == "top":
        from exporter.commands.top import run_top  # noqa: PLC0415 - Python may be built without curses

        return run_top
    commands = {"serve": run_server, "demo": run_server, "once": run_once, "check": run_check, "drill": run_drill}
    return commands[name]


def run_command(words: Sequence[str]) -> int:
    """Run a command line; returns its exit code.

    Raises BrokenPipeError where nobody reads the output, and OSError where help or version cannot be written.
    """
    try:
        arguments = parse_command_line(words)
    finally:
        sys.stdout.flush()  # --help and --version print and exit in the parser
    start_logging(arguments.log_level, arguments.log_format)
    journal.use_journal(os.environ, sys.stderr.fileno())
    for stream in (sys.stdout, sys.stderr):  # a name may have letters that the locale's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    raise_fd_limit()
    with contextlib.suppress(OSError):  # /proc is hidden, and with it everybody's name
        # Whatever started us, "python3" included: other agents know our throw-away VM by this name.
        Path("/proc/self/comm").write_text(AGENT_COMM)
    try:
        code = choose_command(arguments.command)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as err:
        log.error("cannot go on", extra={"fields": {"err": str(err)}})
        discard_output()
        return WRONG_USAGE if isinstance(err, WrongUsage) else 1
    return code
