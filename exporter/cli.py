"""Flags, wiring, signals: the only place that knows everybody.

Flags are spelled as node_exporter's. Without a command the program serves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter import wiring
from exporter.commands.report import render_json, render_table
from exporter.history.recorder import Lately
from exporter.host_summary import can_read, has_counters, render_check
from exporter.logs import journal
from exporter.logs.formatters import LEVELS, start_logging
from exporter.monitor.stall_monitor import Watch
from exporter.prometheus import metrics
from exporter.prometheus.collector import COLLECTORS, BuildInfo, CollectorSettings, HostCollector
from exporter.prometheus.exposition import render_text
from exporter.prometheus.vm_series import VcpuSeries
from exporter.stalls.drill import ask_for_drill
from exporter.web.listeners import Address, TcpAddress, parse_address
from kvm.counters.bpf import BpfSource
from kvm.counters.debugfs import DebugfsSource
from kvm.counters.source import CounterSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.uevents import open_uevents, read_uevent
from kvm.discovery.vm_discovery import Discovery
from kvm.host import facts
from kvm.host.privileges import read_confinement
from kvm.identity.owners import OwnerCache
from kvm.identity.vm_ids import OWNER_WAIT_SECONDS
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, SnapshotReader
from kvm.read_errors import ReadErrors
from kvm.simulated.host import SimulatedHost
from kvm.snapshot import HostReader

log = logging.getLogger(__name__)

NAME = "kvm-notify-exporter"
WANTED = (NOTIFY_WINDOW_EXITS, EXITS)
PROC, SYSFS, KVM_DEVICE, KVM_DEBUGFS = Path("/proc"), Path("/sys"), Path("/dev/kvm"), Path("/sys/kernel/debug/kvm")
SOURCES = ("bpf", "stats_fd", "debugfs")
COMMANDS = {
    "serve": "serve metrics over HTTP (the default)",
    "once": "take one look, print it and exit",
    "check": "explain what works on this host, what does not, and why",
    "demo": "serve a made-up host, to see what there is to see",
    "drill": "let a running agent raise a stall that is not real, to test who is called",
}
# A process that hangs is given up on after 10 s (OwnerCache): one look waits for it.
ONE_LOOK_WAIT_SECONDS = 11.0
MEMORIES = frozenset({metrics.HOST_NOTIFY_WINDOW_EXITS})
DEFAULT_ADDRESS = TcpAddress("", 9750)
# Each VM is held by one pidfd; the rest is for sockets and what one look opens and closes.
WANTED_FDS = 65536


def read_version() -> str:
    """Return the version that is installed, "" where the package is not."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return ""


def parse_sources(text: str) -> tuple[str, ...]:
    """Return the sources of a list like ``bpf,stats_fd``, in its order; raises argparse.ArgumentTypeError."""
    names = tuple(text.split(","))
    if len(set(names)) != len(names) or not set(names) <= set(SOURCES):
        raise argparse.ArgumentTypeError(f"{text!r}: a list without repetition of {', '.join(SOURCES)} is wanted")
    return names


def parse_pattern(text: str) -> re.Pattern[str]:
    """Return a compiled regular expression; raises argparse.ArgumentTypeError."""
    try:
        return re.compile(text)
    except re.error as err:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {err}") from err


def parse_listen_address(text: str) -> Address:
    """Return where to listen; raises argparse.ArgumentTypeError."""
    try:
        return parse_address(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def parse_prom_path(text: str) -> Path:
    """Return the path of a file that node_exporter's textfile collector reads: one that ends in .prom."""
    if not text.endswith(".prom"):
        raise argparse.ArgumentTypeError(f"{text!r}: the textfile collector reads *.prom only")
    return Path(text)


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
        if name == "drill":
            wiring.add_drill_flags(command)
            continue
        if name != "demo":
            add_source_flags(command)
        if name != "check":
            add_collector_flags(command)
        if name in ("serve", "demo"):
            wiring.add_watch_flags(command, of_this_host=name == "serve")
            add_web_flags(command)
        if name == "once":
            form = command.add_mutually_exclusive_group()
            form.add_argument("--format", choices=("prometheus", "json", "table"), help="(default: table)")
            form.add_argument(
                "--output", metavar="FILE.prom", type=parse_prom_path, help="write metrics to this file, all at once"
            )
    return parser


def add_log_flags(parser: argparse.ArgumentParser, level: str) -> None:
    """Add the flags of the log, whose level is ``level`` unless it is given."""
    parser.add_argument("--log.level", dest="log_level", choices=LEVELS, default=level)
    parser.add_argument("--log.format", dest="log_format", choices=("logfmt", "json"), default="logfmt")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sources."""
    parser.add_argument(
        "--collector.source",
        dest="sources",
        metavar="LIST",
        type=parse_sources,
        default=SOURCES,
        help=f"sources of counters in order of preference (default: {','.join(SOURCES)})",
    )


def add_collector_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the collectors."""
    for name in COLLECTORS:
        parser.add_argument(
            f"--collector.{name}",
            dest=f"collector_{name}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"switch the collector {name} on or off (default: on)",
        )
    parser.add_argument(
        "--collector.disable-defaults",
        dest="disable_defaults",
        action="store_true",
        help="switch off every collector that is not switched on by name",
    )
    parser.add_argument(
        "--vcpu-series",
        dest="vcpu_series",
        type=VcpuSeries,
        choices=list(VcpuSeries),
        default=VcpuSeries.ALL,
        help="which vCPUs have counters of their own: all, those with notify exits, or none (default: all)",
    )
    for name, what in (("include", "only VMs"), ("exclude", "no VM")):
        parser.add_argument(
            f"--vm.{name}",
            dest=f"vm_{name}",
            metavar="REGEX",
            type=parse_pattern,
            help=f"show {what} whose name or id it matches anywhere",
        )


def add_web_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the HTTP server."""
    parser.add_argument(
        "--web.listen-address",
        dest="listen_addresses",
        metavar="ADDRESS",
        action="append",
        type=parse_listen_address,
        help="where to listen: HOST:PORT, [IPV6]:PORT, :PORT or unix:PATH; repeatable (default: :9750)",
    )
    parser.add_argument("--web.telemetry-path", dest="telemetry_path", metavar="PATH", default="/metrics")
    parser.add_argument(
        "--web.max-requests",
        dest="max_requests",
        metavar="NUMBER",
        type=int,
        default=40,
        help="scrapes at once, beyond which the answer is 503; 0 for no limit (default: 40)",
    )
    parser.add_argument(
        "--web.disable-exporter-metrics",
        dest="disable_exporter_metrics",
        action="store_true",
        help="leave out metrics about the exporter itself (process_*, python_*)",
    )


def choose_collectors(arguments: argparse.Namespace) -> frozenset[str]:
    """Return the names of the collectors that are switched on."""
    chosen = {name: getattr(arguments, f"collector_{name}") for name in COLLECTORS}
    default = not arguments.disable_defaults
    return frozenset(name for name, wanted in chosen.items() if (default if wanted is None else wanted))


def raise_fd_limit() -> None:
    """Raise the soft limit of open files to what a host full of VMs needs, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FDS if hard == resource.RLIM_INFINITY else min(WANTED_FDS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_host(
    sources: Sequence[str],
    stack: contextlib.ExitStack,
    owner_wait_seconds: float = OWNER_WAIT_SECONDS,
    bpf: BpfSource | None = None,
) -> HostReader:
    """Return the reader of this host; ``stack`` closes what it needs. ``bpf`` is its source of that name, if given."""
    errors = ReadErrors()
    uevents: Callable[[], bytes] = bytes  # none
    try:
        uevents = partial(read_uevent, stack.enter_context(open_uevents()))
    except OSError as err:
        log.info("no uevents: new VMs are found by looking", extra={"fields": {"why": err.strerror}})
    makers: dict[str, Callable[[], CounterSource]] = {
        "bpf": lambda: bpf or BpfSource(WANTED),
        "stats_fd": lambda: StatsFdSource(WANTED, errors.teller("stats_fd")),
        "debugfs": lambda: DebugfsSource(WANTED, KVM_DEBUGFS, PROC, errors.teller("debugfs")),
    }
    owners = OwnerCache(errors.teller("owners"))
    discovery = Discovery(PROC, errors.teller("discovery"), uevents=uevents)
    reader = HostReader(
        [makers[name]() for name in sources], discovery, owners.find, errors, owner_wait_seconds=owner_wait_seconds
    )
    stack.callback(reader.close)
    return reader


def build_collector(reader: SnapshotReader, arguments: argparse.Namespace, watch: Watch | None = None) -> HostCollector:
    """Return the collector that the flags ask for."""
    settings = CollectorSettings(
        enabled=choose_collectors(arguments),
        vcpu_series=arguments.vcpu_series,
        vm_include=arguments.vm_include,
        vm_exclude=arguments.vm_exclude,
    )
    build = BuildInfo(read_version(), "", platform.python_version())
    return HostCollector(reader, settings, build, time.perf_counter, watch.report if watch else None)


def run_check(arguments: argparse.Namespace) -> int:
    """Print what works on this host; 0 if counters can be read, else 1."""
    with contextlib.ExitStack() as stack:
        snapshot = open_host(arguments.sources, stack, ONE_LOOK_WAIT_SECONDS).read()
    cpuinfo = (PROC / "cpuinfo").read_text(errors="replace")
    sys.stdout.write(render_check(snapshot, read_confinement(PROC, SYSFS), facts.parse_vmx_flags(cpuinfo)))
    return 0 if can_read(snapshot) else 1


def run_once(arguments: argparse.Namespace) -> int:
    """Print one look at the host, or write it to a file; 0 if counters could be read, else 1."""
    with contextlib.ExitStack() as stack:
        collector = build_collector(open_host(arguments.sources, stack, ONE_LOOK_WAIT_SECONDS), arguments)
        # One look has seen nothing move: what is a memory of looks would be a 0 for ever.
        families = [family for family in collector.collect() if family.metric not in MEMORIES]
        snapshot = collector.snapshot
    if snapshot is None:
        return 1
    if arguments.output is not None:
        write_whole(arguments.output, render_text(families))
    elif arguments.format == "prometheus":
        sys.stdout.write(render_text(families))
    else:
        sys.stdout.write(render_json(snapshot) if arguments.format == "json" else render_table(snapshot))
    return 0 if has_counters(snapshot) else 1


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part; raises OSError."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # the collector reads *.prom, not this
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def run_server(arguments: argparse.Namespace) -> int:
    """Serve this host, or a made-up one, until a signal ends it."""
    # Importing aiohttp takes longer than all the rest of what the other commands do.
    from exporter.web.server import ServerSettings, serve  # noqa: PLC0415

    settings = ServerSettings(
        addresses=tuple(arguments.listen_addresses or [DEFAULT_ADDRESS]),
        telemetry_path=arguments.telemetry_path,
        max_requests=arguments.max_requests,
        exporter_metrics=not arguments.disable_exporter_metrics,
        host_name=platform.node(),
    )
    with contextlib.ExitStack() as stack:
        if arguments.command == "demo":
            made_up = SimulatedHost()
            lately = Lately(wiring.SharedReader(made_up))
            watch = wiring.open_simulated_watch(arguments, lately, made_up)
        else:
            bpf = BpfSource(WANTED) if "bpf" in arguments.sources else None
            lately = Lately(wiring.SharedReader(open_host(arguments.sources, stack, bpf=bpf)))
            watch = wiring.open_watch(arguments, lately, bpf)
        collector = build_collector(lately, arguments, watch)
        asyncio.run(run_until_signalled(watch, lambda stop: serve(collector, lately, settings, stop, watch)))
    return 0


async def run_until_signalled(watch: Watch, serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Serve and watch until SIGINT or SIGTERM, then finish what is under way."""
    stop, stop_watching = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    watching_task = asyncio.create_task(watch.run(stop_watching))
    try:
        await serve(stop)
    finally:
        stop_watching.set()  # only now: the last scrape still asks the watch
        await watching_task


def run_drill(arguments: argparse.Namespace) -> int:
    """Let a running agent raise a drill; 0 if it does."""
    sys.stdout.write(f"{ask_for_drill(arguments.url, arguments.vm)}\n")
    return 0


def parse_command_line(words: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for; exits with 2 for a wrong one, as argparse does."""
    known = {*COMMANDS, "-h", "--help", "--version"}
    return build_parser().parse_args(words if words and words[0] in known else ["serve", *words])


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_command_line(sys.argv[1:] if words is None else words)
    start_logging(arguments.log_level, arguments.log_format)
    journal.use_journal(os.environ, sys.stderr.fileno())
    for stream in (sys.stdout, sys.stderr):  # a name may have letters that the locale's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    raise_fd_limit()
    commands = {"serve": run_server, "demo": run_server, "once": run_once, "check": run_check, "drill": run_drill}
    try:
        code = commands[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as err:
        log.error("cannot go on", extra={"fields": {"why": str(err)}})
        return 1
    return code
