"""``once``: take one snapshot, print it and exit."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from exporter.commands.agent_report import is_all_known, read_agent_report, render_report
from exporter.commands.columns import render_columns
from exporter.commands.statistics_report import render_statistics, render_statistics_json
from exporter.flag_values import WrongUsage, choose_paths, choose_statistics, select_statistics
from exporter.host_summary import can_read, describe_blind_spots
from exporter.prometheus import metrics
from exporter.prometheus.exposition import render_text
from exporter.stalls.verdicts import State
from exporter.top.cells import UNKNOWN
from exporter.top.feed import read_twice
from exporter.web.listeners import Address
from exporter.wiring import SINGLE_SNAPSHOT_WAIT_SECONDS, build_collector, open_host
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Snapshot, VmReading

# The rates of --stats are over so long.
RATE_SECONDS = 1.0
MEMORIES = frozenset({metrics.HOST_NOTIFY_WINDOW_EXITS})


def run_once(arguments: argparse.Namespace) -> int:
    """Print one snapshot of the host, or write it to a file; 0 if counters could be read, else 1."""
    if arguments.stats and arguments.from_agent is not None:
        raise WrongUsage("--stats reads the host, --from-agent asks the agent: one of them")
    if arguments.from_agent is not None:
        return print_agent_report(arguments.from_agent, "prometheus" if arguments.output else arguments.format)
    if arguments.stats:
        return print_statistics(arguments)
    with contextlib.ExitStack() as stack:
        selection = choose_statistics(arguments)
        host = open_host(
            arguments.sources, stack, SINGLE_SNAPSHOT_WAIT_SECONDS, paths=choose_paths(arguments), selection=selection
        )
        collector = build_collector(host.reader, arguments)
        # One snapshot has seen nothing move: what remembers increases would be a 0 for ever.
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
    return 0 if can_read(snapshot) else 1


def print_statistics(arguments: argparse.Namespace) -> int:
    """Print everything that KVM counts, as a table or JSON; 0 if counters could be read, else 1. Raises WrongUsage."""
    if arguments.output is not None or arguments.format == "prometheus":
        raise WrongUsage("--stats prints a table or JSON; as metrics statistics are had with --collector.stats")
    selection = select_statistics(arguments, arguments.stats_level)
    with contextlib.ExitStack() as stack:
        host = open_host(
            arguments.sources, stack, SINGLE_SNAPSHOT_WAIT_SECONDS, paths=choose_paths(arguments), selection=selection
        )
        comparison = read_twice(host.reader, RATE_SECONDS)
    if arguments.format == "json":
        sys.stdout.write(render_statistics_json(comparison, build_document(comparison.now)))
    else:
        sys.stdout.write(render_statistics(comparison))
    return 0 if can_read(comparison.now) else 1


def print_agent_report(address: Address, form: str | None) -> int:
    """Print what a running agent knows; 0 if nothing can be missing in that, else 1. Raises OSError, ValueError."""
    if form == "prometheus":
        raise WrongUsage("--from-agent prints a table or JSON; the agent's metrics are at its /metrics")
    document = read_agent_report(address)
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if form == "json" else render_report(document))
    return 0 if is_all_known(document) else 1


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


_TABLE_HEADER = (
    *("VM", "NAME", "OWNER", "VMM", "PID", "VCPU", "STATE", "TID", "NOTIFY EXITS", "EXITS"),
    *("PROTECTION", "SOURCE"),
)


_RIGHT = {"PID", "VCPU", "TID", "NOTIFY EXITS", "EXITS"}


def build_document(snapshot: Snapshot) -> dict[str, object]:
    """Return a snapshot as plain data; a number that was not read is null, or its key is missing."""
    return {
        "unix_seconds": snapshot.unix_seconds,
        "complete": snapshot.complete,
        "blind_spots": [spot._asdict() for spot in snapshot.blind_spots],
        "host": asdict(snapshot.host),
        "sources": [asdict(source) for source in snapshot.sources],
        "vms": [_build_vm(reading) for reading in snapshot.readings],
        "errors": [
            {"source": source, "kind": kind, "count": count} for (source, kind), count in snapshot.errors.items()
        ],
    }


def _build_vm(reading: VmReading) -> dict[str, object]:
    owner = asdict(reading.vm.owner)
    del owner["own_id"]  # it is the id where it matters
    return {
        "vm": reading.vm.id,
        "pid": reading.vm.key.pid,
        "start_time_seconds": reading.vm.start_time_seconds,
        **owner,
        "source": reading.source or None,
        "problem": reading.counters.problem or None,
        "protection": reading.protection,
        "notify_window_cycles": reading.counters.notify_window_cycles,
        "vcpu_count": reading.vcpu_count,
        "totals": _sum_counters(reading),
        "vcpus": list(_build_vcpus(reading)),
    }


def _sum_counters(reading: VmReading) -> dict[str, int]:
    """Sum over all vCPUs, as far as all were read."""
    counters = reading.counters
    if counters.totals or len(reading.vcpus) != reading.vcpu_count:
        return dict(counters.totals)
    return {name: sum(column) for name, column in counters.per_vcpu.items()}


def _build_vcpus(reading: VmReading) -> Iterable[dict[str, object]]:
    for position, vcpu in enumerate(reading.vcpus):
        counters = {name: values[position] for name, values in sorted(reading.counters.per_vcpu.items())}
        state = judge_once(counters)
        yield {"vcpu": vcpu.index, "vcpu_id": vcpu.vcpu_id, "tid": vcpu.tid, "state": state, **counters}


def judge_once(counters: Mapping[str, int]) -> State | None:
    """Judge a vCPU as far as one snapshot can: it never took a notify exit, or it may be taking them; None: not read.

    Whether it is stuck takes a trace, and time: that is what ``serve`` is for.
    """
    notify_exits = counters.get(NOTIFY_WINDOW_EXITS)
    if notify_exits is None:
        return None
    return State.UNKNOWN if notify_exits else State.QUIET


def render_json(snapshot: Snapshot) -> str:
    """Render a snapshot as one JSON document."""
    return json.dumps(build_document(snapshot), indent=2) + "\n"


def render_table(snapshot: Snapshot) -> str:
    """Render a snapshot as a table: a row a vCPU, and a row a VM whose vCPUs could not be read."""
    rows = [row for reading in snapshot.readings for row in _build_rows(reading)]
    if not rows:
        return (
            "no VM found\n"
            if snapshot.complete
            else f"no VM found, but there may be some: {describe_blind_spots(snapshot)}\n"
        )
    return render_columns(_TABLE_HEADER, rows, _RIGHT)


def _build_rows(reading: VmReading) -> Iterable[Sequence[object]]:
    owner = reading.vm.owner
    who = (reading.vm.id, owner.name or UNKNOWN, owner.project or owner.namespace or UNKNOWN, owner.vmm)
    how = (reading.protection, reading.source or reading.counters.problem or UNKNOWN)
    columns = reading.counters.per_vcpu
    if not columns:
        totals = reading.counters.totals
        vcpus = f"all {reading.vcpu_count}" if reading.vcpu_count is not None else UNKNOWN
        yield (*who, reading.vm.key.pid, vcpus, judge_once(totals) or UNKNOWN, UNKNOWN, *_pick(totals), *how)
        return
    for position, vcpu in enumerate(reading.vcpus):
        counters = {name: values[position] for name, values in columns.items()}
        about = (vcpu.index, judge_once(counters) or UNKNOWN, vcpu.tid or UNKNOWN)
        yield (*who, reading.vm.key.pid, *about, *_pick(counters), *how)


def _pick(counters: Mapping[str, int]) -> tuple[object, object]:
    return counters.get(NOTIFY_WINDOW_EXITS, UNKNOWN), counters.get(EXITS, UNKNOWN)
