"""Builds what the flags ask for: the reader of this host, the collector, the stall monitor."""

from __future__ import annotations

import argparse
import contextlib
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from exporter.build_info import BuildInfo, read_version
from exporter.flag_values import choose_collectors, choose_paths
from exporter.monitor.agent_usage import read_agent_usage
from exporter.monitor.backends import Backends, Trigger
from exporter.monitor.cpu_time import read_cpu_time
from exporter.monitor.stall_monitor import StallMonitor
from exporter.monitor.vcpu_reader import make_vcpu_reader
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.metrics import Metric
from exporter.prometheus.selection import CollectorSettings
from exporter.stalls.verdicts import StallRule
from kvm.bpf.notify_trigger import NotifyCall, NotifyTrigger
from kvm.counters.bpf import BpfSource
from kvm.counters.debugfs import DebugfsSource
from kvm.counters.source import CounterSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.counters.vcpu_sources import VcpuSource, VcpuSources
from kvm.discovery.processes import is_thread_of, open_vm_process
from kvm.discovery.uevents import open_uevents, read_uevent
from kvm.discovery.vm_discovery import Discovery
from kvm.host.facts import read_host
from kvm.host.kvm_device import may_run_tds
from kvm.host.paths import HostPaths
from kvm.identity.owner_cache import OwnerCache
from kvm.identity.vm_ids import OWNER_WAIT_SECONDS
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, SnapshotReader
from kvm.perf.instruction import InstructionReader
from kvm.perf.notify_tracer import NotifyTracer
from kvm.read_errors import ReadErrors
from kvm.simulated.host import SimulatedHost
from kvm.simulated.tracer import SimulatedTracer
from kvm.snapshot import HostReader
from kvm.statistics import StatSelection

log = logging.getLogger(__name__)

WANTED = (NOTIFY_WINDOW_EXITS, EXITS)
# A process that hangs is given up on after 10 s (OwnerCache): one snapshot waits for it.
SINGLE_SNAPSHOT_WAIT_SECONDS = 11.0


class OpenHost(NamedTuple):
    """What reads this host: snapshots, and single vCPUs."""

    reader: HostReader
    vcpus: VcpuSources


def open_stall_monitor(arguments: argparse.Namespace, reader: SnapshotReader, vcpus: VcpuSources) -> StallMonitor:
    """Return the stall monitor of this host; ``vcpus`` reads registers, or what a patched KVM tells."""

    paths = choose_paths(arguments)

    def make_trigger(on_call: Callable[[NotifyCall], None]) -> Trigger:
        return NotifyTrigger(on_call, function=arguments.trigger_function, kallsyms=paths.kallsyms, sys=paths.sysfs)

    instructions = InstructionReader(paths.tracefs, proc=paths.procfs, sysfs=paths.sysfs)

    backends = Backends(
        reader=reader,
        tracer=make_tracer(paths),
        read_vcpu=make_vcpu_reader(vcpus.read_vcpu),
        open_pidfd=partial(open_vm_process, proc=paths.procfs),
        is_thread=partial(is_thread_of, proc=paths.procfs),
        read_cpu_time=read_cpu_time,
        read_agent_usage=read_agent_usage,
        may_run_tds=partial(may_run_tds, paths.sysfs),
        rip_sources=lambda: vcpus.rip_sources,
        make_trigger=make_trigger if arguments.trigger_bpf else None,
        read_instruction=instructions.read if arguments.shows_instruction else None,
    )
    return StallMonitor(backends, rule=StallRule(arguments.stall_exits, arguments.stall_seconds), poll=arguments.poll)


def make_tracer(paths: HostPaths) -> NotifyTracer:
    """Return the tracer of this host, not open."""
    return NotifyTracer(paths.tracefs, proc=paths.procfs, sysfs=paths.sysfs)


def open_simulated_monitor(arguments: argparse.Namespace, reader: SnapshotReader, host: SimulatedHost) -> StallMonitor:
    """Return the stall monitor of a simulated host."""
    backends = Backends(
        reader=reader,
        tracer=SimulatedTracer(host),
        read_vcpu=make_vcpu_reader(host.read_vcpu),
        read_cpu_time=host.read_cpu_time,
        read_agent_usage=read_agent_usage,
    )
    return StallMonitor(backends, rule=StallRule(arguments.stall_exits, arguments.stall_seconds), poll=arguments.poll)


def open_host(
    sources: Sequence[str],
    stack: contextlib.ExitStack,
    owner_wait_seconds: float = OWNER_WAIT_SECONDS,
    *,
    paths: HostPaths | None = None,
    selection: StatSelection | None = None,
) -> OpenHost:
    """Return what reads this host; ``stack`` closes what it needs.

    ``selection`` says which statistics of KVM are to be read besides the counters.
    """
    paths, errors = paths or HostPaths(), ReadErrors()
    proc, sysfs = paths.procfs, paths.sysfs
    uevents: Callable[[], bytes] = bytes  # none
    try:
        uevents = partial(read_uevent, stack.enter_context(open_uevents()))
    except OSError as err:
        log.info("no uevents: new VMs are found by scanning /proc", extra={"fields": {"err": err.strerror}})
    bpf = BpfSource(WANTED, selection=selection, proc=proc, sys=sysfs)
    stats_fd = StatsFdSource(WANTED, errors.teller("stats_fd"), kallsyms=paths.kallsyms, selection=selection, proc=proc)
    debugfs = DebugfsSource(WANTED, paths.kvm_debugfs, proc, errors.teller("debugfs"), sysfs, selection=selection)
    counters: dict[str, CounterSource] = {source.name: source for source in (bpf, stats_fd, debugfs)}
    per_vcpu: tuple[VcpuSource, ...] = (bpf, stats_fd)
    owners = OwnerCache(
        errors.teller("owners"), proc=proc, cgroups=paths.cgroups, libvirt_directories=paths.libvirt_directories
    )
    stack.callback(owners.close)
    discovery = Discovery(proc, errors.teller("discovery"), uevents=uevents)
    reader = HostReader(
        [counters[name] for name in sources],
        discovery,
        owners.find,
        errors,
        proc=proc,
        kvm_debugfs=paths.kvm_debugfs,
        kvm_module=paths.kvm_module,
        read_host=partial(read_host, proc, sysfs),
        owner_wait_seconds=owner_wait_seconds,
    )
    stack.callback(reader.close)
    return OpenHost(reader, VcpuSources([source for source in per_vcpu if source.name in sources]))


def build_collector(
    reader: SnapshotReader,
    arguments: argparse.Namespace,
    monitor: StallMonitor | None = None,
    file_states: Mapping[Metric, Callable[[], bool]] = MappingProxyType({}),
    first_total: int = 0,
) -> HostCollector:
    """Return the collector that the flags ask for; the rest is as HostCollector takes it."""
    settings = CollectorSettings(
        enabled=choose_collectors(arguments),
        vcpu_series=arguments.vcpu_series,
        vm_labels=arguments.vm_labels,
        vm_include=arguments.vm_include,
        vm_exclude=arguments.vm_exclude,
    )
    build = BuildInfo(read_version(), "", platform.python_version())
    read_report = partial(monitor.report, with_verdicts=False) if monitor else None
    return HostCollector(
        reader, settings, build, time.perf_counter, read_report, file_states=file_states, first_total=first_total
    )
