"""What an operator types, as values: after one flag (``parse_``), and with several flags together (``choose_``)."""

from __future__ import annotations

import argparse
import grp
from pathlib import Path

from exporter.patterns import BadPattern, NamePattern, choose_names, compile_pattern, find_re2
from exporter.prometheus.selection import COLLECTORS, DEFAULT_COLLECTORS
from exporter.web.listeners import Address, parse_address
from exporter.web.settings import check_telemetry_path
from kvm.host.paths import HostPaths
from kvm.statistics import StatScope, StatSelection

SHORTEST_INTERVAL = 0.1
SOURCES = ("bpf", "stats_fd", "debugfs")


class WrongUsage(ValueError):
    """Flags that contradict each other: to try again with the same would be in vain."""


def parse_sources(text: str) -> tuple[str, ...]:
    """Return the sources of a list like ``bpf,stats_fd``, in its order; raises argparse.ArgumentTypeError."""
    names = tuple(text.split(","))
    if len(set(names)) != len(names) or not set(names) <= set(SOURCES):
        raise argparse.ArgumentTypeError(f"{text!r}: a list without repetition of {', '.join(SOURCES)} is wanted")
    return names


def parse_pattern(text: str) -> NamePattern:
    """Return a compiled regular expression; raises argparse.ArgumentTypeError."""
    try:
        return compile_pattern(text, find_re2())
    except BadPattern as err:
        raise argparse.ArgumentTypeError(f"{text!r}: {err}") from err


def parse_group(text: str) -> int:
    """Return the number of a group, by name or as it is; raises argparse.ArgumentTypeError."""
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError as err:
        if text.isascii() and text.isdigit() and int(text) < 1 << 32:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such group") from err


def parse_listen_address(text: str) -> Address:
    """Return where to listen; raises argparse.ArgumentTypeError."""
    try:
        return parse_address(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def parse_telemetry_path(text: str) -> str:
    """Return where the metrics are to be; raises argparse.ArgumentTypeError."""
    try:
        return check_telemetry_path(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def parse_file(text: str) -> Path:
    """Return the path of a file, which need not be there; raises argparse.ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("the path of a file is wanted")
    return Path(text)


def parse_directory(text: str) -> Path:
    """Return the absolute path of a directory; raises argparse.ArgumentTypeError."""
    path = Path(text)
    if not path.is_absolute() or not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: the absolute path of a directory is wanted")
    return path


def parse_procfs(text: str) -> Path:
    """Return the absolute path of a directory where a proc file system is; raises argparse.ArgumentTypeError."""
    path = parse_directory(text)
    if not (path / "self").is_symlink():  # to nothing where its pid namespace is another one
        raise argparse.ArgumentTypeError(f"{text!r}: the mount point of a procfs is wanted")
    return path


def parse_prom_path(text: str) -> Path:
    """Return the path of a file that node_exporter's textfile collector reads: one that ends in .prom."""
    if not text.endswith(".prom"):
        raise argparse.ArgumentTypeError(f"{text!r}: the textfile collector reads *.prom only")
    return Path(text)


def parse_count(text: str) -> int:
    """Return a whole number, not negative; raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 on is wanted")
    return int(text)


def parse_exits(text: str) -> int:
    """Return a number of exits, two at least; raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 2 on is wanted")
    return int(text)


def parse_seconds(text: str) -> float:
    """Return a time in seconds, not negative; raises argparse.ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds from 0 to 86400 is wanted")
    return seconds


def parse_interval(text: str) -> float:
    """Return a time between two readings of the host; raises argparse.ArgumentTypeError."""
    seconds = parse_seconds(text)
    if seconds < SHORTEST_INTERVAL:
        raise argparse.ArgumentTypeError(f"{text!r}: {SHORTEST_INTERVAL} seconds at least are wanted")
    return seconds


def choose_paths(arguments: argparse.Namespace) -> HostPaths:
    """Return where the host's file systems are."""
    return HostPaths(arguments.path_procfs, arguments.path_sysfs, arguments.path_rootfs)


def choose_collectors(arguments: argparse.Namespace) -> frozenset[str]:
    """Return the names of the collectors that are switched on."""
    chosen = {name: getattr(arguments, f"collector_{name}") for name in COLLECTORS}
    defaults = () if arguments.disable_defaults else DEFAULT_COLLECTORS
    return frozenset(name for name, wanted in chosen.items() if (name in defaults if wanted is None else wanted))


def choose_statistics(arguments: argparse.Namespace) -> StatSelection | None:
    """Return which statistics of KVM are to be read besides the counters, None where none are."""
    if "stats" not in choose_collectors(arguments):
        return None
    return select_statistics(arguments, arguments.stats_level)


def select_statistics(arguments: argparse.Namespace, level: StatScope) -> StatSelection:
    """Return the statistics whose names the flags ask for."""
    return StatSelection(level, choose_names(arguments.stats_include, arguments.stats_exclude))
