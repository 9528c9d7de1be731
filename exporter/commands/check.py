"""``check``: explain what works on this host, what does not, and why."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporter.flag_values import choose_paths, choose_statistics
from exporter.host_summary import can_read, render_check
from exporter.prometheus.exposition import Family
from exporter.prometheus.series_warning import MANY_SERIES, count_series
from exporter.wiring import SINGLE_SNAPSHOT_WAIT_SECONDS, build_collector, make_tracer, open_host
from kvm.errors import SourceUnavailable
from kvm.host.facts import read_vmx_flags
from kvm.host.privileges import read_privileges
from kvm.perf.notify_tracer import NotifyTracer

STATISTIC_NAME: Final = re.compile("kvm_(vm|vcpu)_stat_")
TOLD_BY_KVM: Final = "can be told: KVM itself tells where notify exits are (kvm/patches), so that nothing is traced"


def run_check(arguments: argparse.Namespace) -> int:
    """Print what works on this host; 0 if counters can be read, else 1. With a web configuration, check that alone."""
    if arguments.web_config_file is not None:
        return check_web_config(arguments.web_config_file)
    selection, paths = choose_statistics(arguments), choose_paths(arguments)
    with contextlib.ExitStack() as stack:
        host = open_host(arguments.sources, stack, SINGLE_SNAPSHOT_WAIT_SECONDS, paths=paths, selection=selection)
        collector = build_collector(host.reader, arguments)
        families = collector.collect()
        # While the sources are open, as serve has them: it is one process that has to have fds for both.
        tracing = TOLD_BY_KVM if host.vcpus.rip_sources else try_tracing(make_tracer(paths))
    if collector.snapshot is None:
        return 1
    report = render_check(
        collector.snapshot,
        read_privileges(paths.procfs, paths.sysfs),
        read_vmx_flags(paths.procfs),
        tracing,
        series=describe_series(families, has_statistics=selection is not None),
    )
    sys.stdout.write(report)
    return 0 if can_read(collector.snapshot) else 1


def describe_series(families: Sequence[Family], *, has_statistics: bool) -> str:
    """Say how many series the flags give here."""
    total = count_series(families)
    of_statistics = count_series(family for family in families if STATISTIC_NAME.match(family.metric.name))
    parts = [f"{total:,} with these flags"]
    if has_statistics:
        parts.append(f"{of_statistics:,} of them by --collector.stats")
    if total > MANY_SERIES:
        parts.append(f"more than {MANY_SERIES:,}: --collector.stats.include and .level make them fewer")
    return ", ".join(parts)


def check_web_config(path: Path) -> int:
    """Print what a web configuration does, or raise ConfigError with what is wrong with it."""
    # The libraries that it takes are nothing to wait for otherwise.
    from exporter.web.web_config import describe_web_config  # noqa: PLC0415
    from exporter.web.web_config_file import load_web_config  # noqa: PLC0415

    sys.stdout.write(f"{path} is valid: {describe_web_config(load_web_config(path).config)}\n")
    return 0


def try_tracing(tracer: NotifyTracer) -> str:
    """Say whether notify exits can be traced: the tracer arms a thread of our own to find out."""
    try:
        with contextlib.closing(tracer):
            tracer.open()
            tracefs = tracer.tracefs
            where = "a private instance of tracefs, as none is mounted" if tracefs and tracefs.is_private else "tracefs"
            return f"can be told: exits can be traced, by {where}"
    except SourceUnavailable as err:
        return f"cannot be told from other notify exits: {err.reason}" + (f" -> {err.remedy}" if err.remedy else "")
