"""The flags of every command, spelled as node_exporter's."""

from __future__ import annotations

import argparse
import grp
from pathlib import Path

from exporter.logs.formatters import LEVELS
from exporter.monitor.backends import PollMode
from exporter.patterns import BadPattern, NamePattern, choose_names, compile_pattern, find_re2
from exporter.prometheus.selection import COLLECTORS, DEFAULT_COLLECTORS
from exporter.prometheus.vm_series import VcpuSeries, VmLabels
from exporter.stalls.verdicts import StallRule
from exporter.web.listeners import Address, TcpAddress, UnixAddress, parse_address
from exporter.web.settings import check_telemetry_path
from kvm.bpf.notify_trigger import FUNCTION
from kvm.host.paths import HostPaths
from kvm.statistics import StatScope, StatSelection

SHORTEST_INTERVAL = 0.1
SOURCES = ("bpf", "stats_fd", "debugfs")


# Where to listen if nobody says: on the network only where clients are asked who they are, or cannot be overheard.
OPEN_ADDRESS, LOOPBACK_ADDRESS = TcpAddress("", 9750), TcpAddress("127.0.0.1", 9750)
SOCKET_ADDRESS = UnixAddress("/run/kvm-notify-exporter/agent.sock")


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


class WrongUsage(ValueError):
    """Flags that contradict each other: to try again with the same would be in vain."""


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


def add_log_flags(parser: argparse.ArgumentParser, level: str) -> None:
    """Add the flags of the log, whose level is ``level`` unless it is given."""
    parser.add_argument(
        "--log.level",
        dest="log_level",
        choices=LEVELS,
        default=level,
        help="log what is as bad as this, and worse (default: %(default)s)",
    )
    parser.add_argument(
        "--log.format",
        dest="log_format",
        choices=("logfmt", "json"),
        default="logfmt",
        help="how a line is written (default: %(default)s)",
    )


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


def add_path_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the host's file systems are."""
    default = HostPaths()
    for name, parse, path, what in (
        ("procfs", parse_procfs, default.procfs, "proc is mounted, of the host's pid namespace"),
        ("sysfs", parse_directory, default.sysfs, "sysfs is mounted, with what is mounted below it"),
        ("rootfs", parse_directory, default.rootfs, "the host's root is, for libvirt's files"),
    ):
        parser.add_argument(
            f"--path.{name}",
            dest=f"path_{name}",
            metavar="PATH",
            type=parse,
            default=path,
            help=f"where {what} (default: %(default)s)",
        )


def choose_paths(arguments: argparse.Namespace) -> HostPaths:
    """Return where the host's file systems are."""
    return HostPaths(arguments.path_procfs, arguments.path_sysfs, arguments.path_rootfs)


def add_collector_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the collectors."""
    for name in COLLECTORS:
        parser.add_argument(
            f"--collector.{name}",
            dest=f"collector_{name}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"switch the collector {name} on or off (default: {'on' if name in DEFAULT_COLLECTORS else 'off'})",
        )
    add_statistics_flags(parser)
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
    parser.add_argument(
        "--web.labels",
        dest="vm_labels",
        type=VmLabels,
        choices=list(VmLabels),
        default=VmLabels.FULL,
        help="what metrics say of a VM: full, or ids without names and owners, for networks that are not trusted "
        "(default: full)",
    )
    for name, what in (("include", "only VMs"), ("exclude", "no VM")):
        parser.add_argument(
            f"--vm.{name}",
            dest=f"vm_{name}",
            metavar="REGEX",
            type=parse_pattern,
            help=f"show {what} whose name or id it matches anywhere",
        )


def add_state_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the file that outlives the agent."""
    parser.add_argument(
        "--state.file",
        dest="state_file",
        metavar="FILE",
        type=lambda text: Path(text) if text else None,
        help="file that keeps kvm_host_notify_window_exits_total over a restart of the agent, not of the host "
        "(default: none)",
    )


def add_statistics_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose among everything else that KVM counts."""
    add_statistic_pattern_flags(parser, "collector stats: ")
    parser.add_argument(
        "--collector.stats.level",
        dest="stats_level",
        type=StatScope,
        choices=list(StatScope),
        default=StatScope.VM,
        help="collector stats: vm sums the statistics of vCPUs over their VM, those that only grow; vcpu has each of "
        "each vCPU (default: vm)",
    )


def add_statistic_pattern_flags(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Add the flags that choose statistics by their names; the help begins with ``of_what``."""
    for name, what in (("include", "only statistics"), ("exclude", "no statistic")):
        parser.add_argument(
            f"--collector.stats.{name}",
            dest=f"stats_{name}",
            metavar="REGEX",
            type=parse_pattern,
            help=f"{of_what}{what} whose name it matches anywhere; names are like vcpu/halt_exits and "
            "vm/remote_tlb_flush",
        )


def add_top_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the live table."""
    add_statistic_pattern_flags(parser, "")
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=parse_interval,
        default=1.0,
        help="read the host so often (default: 1)",
    )
    parser.add_argument("--vcpus", dest="all_vcpus", action="store_true", help="begin with vCPUs, not with VMs")


def add_web_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the HTTP server."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--web.listen-address",
        dest="listen_addresses",
        metavar="ADDRESS",
        action="append",
        type=parse_listen_address,
        help="where to listen: HOST:PORT, [IPV6]:PORT, :PORT or unix:PATH; repeatable "
        f"(default: :9750 with TLS or authentication, else 127.0.0.1:9750; and {SOCKET_ADDRESS})",
    )
    where.add_argument(
        "--web.systemd-socket",
        dest="systemd_socket",
        action="store_true",
        help="listen on the sockets that systemd passes on (a .socket unit) instead",
    )
    add_web_config_flag(parser, "file with TLS, users and limits, in exporter-toolkit's format; SIGHUP reads it anew")
    parser.add_argument(
        "--web.details-group",
        dest="details_gid",
        metavar="GROUP",
        type=parse_group,
        help="group that the Unix socket is given to: its members see RIPs and owners there, as root does, "
        "and may start drills",
    )
    parser.add_argument(
        "--web.telemetry-path",
        dest="telemetry_path",
        metavar="PATH",
        type=parse_telemetry_path,
        default="/metrics",
        help="where the metrics are (default: %(default)s)",
    )
    parser.add_argument(
        "--web.max-requests",
        dest="max_requests",
        metavar="NUMBER",
        type=parse_count,
        default=40,
        help="scrapes at once, beyond which the answer is 503; 0 for no limit (default: 40)",
    )
    parser.add_argument(
        "--web.disable-exporter-metrics",
        dest="disable_exporter_metrics",
        action="store_true",
        help="leave out metrics about the exporter itself (process_*, python_*)",
    )


def add_web_config_flag(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the flag of the web configuration."""
    parser.add_argument("--web.config.file", dest="web_config_file", metavar="FILE", type=parse_file, help=text)


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


def add_monitor_flags(parser: argparse.ArgumentParser, *, of_this_host: bool) -> None:
    """Add the flags that say what a stall is, and those about how it is found on this host."""
    rule = StallRule()
    parser.add_argument(
        "--stall.exits",
        dest="stall_exits",
        metavar="NUMBER",
        type=parse_exits,
        default=rule.exits,
        help=f"notify exits at one RIP that make a stall, if they also take its time (default: {rule.exits})",
    )
    parser.add_argument(
        "--stall.seconds",
        dest="stall_seconds",
        metavar="SECONDS",
        type=parse_seconds,
        default=rule.seconds,
        help=f"time at one RIP that makes a stall, if it also takes its exits (default: {rule.seconds:g})",
    )
    parser.add_argument(
        "--poll",
        type=PollMode,
        choices=list(PollMode),
        default=PollMode.AUTO,
        help="poll VMs whose counter can move, slowly where a trigger tells of notify exits, or all (default: auto)",
    )
    if of_this_host:
        parser.add_argument(
            "--trigger.bpf",
            dest="trigger_bpf",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="let BPF programs tell of notify exits as they happen (default: on)",
        )
        parser.add_argument(
            "--instruction",
            dest="shows_instruction",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="show in warnings the instruction at which a vCPU is stuck, which is memory of the guest; takes a KVM "
            "with this project's patches, and traces such a vCPU for a moment (default: off)",
        )
        # For tests on hosts without handle_notify().
        parser.add_argument("--trigger.function", dest="trigger_function", default=FUNCTION, help=argparse.SUPPRESS)


def add_from_agent_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that has the running agent asked, and the host not read."""
    parser.add_argument(
        "--from-agent",
        dest="from_agent",
        metavar="unix:PATH",
        nargs="?",
        type=parse_listen_address,
        const=SOCKET_ADDRESS,
        help="print what the running agent knows of vCPUs that take notify exits: their states, owners and since when "
        f"they are stuck; its socket is {SOCKET_ADDRESS} if none is named",
    )


def add_stats_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that has every statistic printed."""
    parser.add_argument(
        "--stats",
        action="store_true",
        help="print every statistic that KVM keeps, with its rate over a second; --collector.stats.include, .exclude "
        "and .level choose among them",
    )


def add_drill_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a drill."""
    parser.add_argument("--vm", metavar="NAME", required=True, help="name or id of the VM that the drill is about")
    parser.add_argument(
        "--url",
        metavar="unix:PATH",
        type=parse_listen_address,
        default=SOCKET_ADDRESS,
        help=f"the agent's Unix socket (default: {SOCKET_ADDRESS})",
    )
