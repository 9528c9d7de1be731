"""The flags of every command, spelled as node_exporter's."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.flag_values import (
    SOURCES,
    parse_count,
    parse_directory,
    parse_exits,
    parse_file,
    parse_group,
    parse_interval,
    parse_listen_address,
    parse_pattern,
    parse_procfs,
    parse_seconds,
    parse_sources,
    parse_telemetry_path,
)
from exporter.logs.formatters import LEVELS
from exporter.monitor.backends import PollMode
from exporter.prometheus.selection import COLLECTORS, DEFAULT_COLLECTORS
from exporter.prometheus.vm_series import VcpuSeries, VmLabels
from exporter.stalls.verdicts import StallRule
from exporter.web.listeners import TcpAddress, UnixAddress
from kvm.bpf.notify_trigger import FUNCTION
from kvm.host.paths import HostPaths
from kvm.statistics import StatScope

# Where to listen if nobody says: on the network only where clients are asked who they are, or cannot be overheard.
OPEN_ADDRESS, LOOPBACK_ADDRESS = TcpAddress("", 9750), TcpAddress("127.0.0.1", 9750)
SOCKET_ADDRESS = UnixAddress("/run/kvm-notify-exporter/agent.sock")


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
        help="scrapes and reads of /api/v1/vcpus at once, beyond which the answer is 503; 0 for no limit (default: 40)",
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
