"""The flags of the watch, and the watch that they ask for: of this host, or of a made-up one."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable

from exporter.monitor.backends import Means, PollMode, Trigger
from exporter.monitor.process_watcher import is_thread_of, open_vm_process
from exporter.monitor.stall_monitor import Watch
from exporter.monitor.trace_session import Reading
from exporter.stalls.verdicts import StallRule
from kvm.bpf.notify_trigger import FUNCTION, NotifyCall, NotifyTrigger
from kvm.bpf.vcpu_decode import VcpuState
from kvm.counters.bpf import BpfSource
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Snapshot, SnapshotReader, SourceUnavailable, VmKey
from kvm.perf.notify_tracer import NotifyTracer
from kvm.simulated.host import SimulatedHost
from kvm.simulated.tracer import SimulatedTracer

DEFAULT_URL = "http://127.0.0.1:9750"


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


def add_watch_flags(parser: argparse.ArgumentParser, *, of_this_host: bool) -> None:
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
        help="poll only VMs whose counter can move, where nothing else tells of notify exits, or all (default: auto)",
    )
    if of_this_host:
        parser.add_argument(
            "--trigger.bpf",
            dest="trigger_bpf",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="let BPF programs tell of notify exits as they happen (default: on)",
        )
        # For tests on hosts without handle_notify().
        parser.add_argument("--trigger.function", dest="trigger_function", default=FUNCTION, help=argparse.SUPPRESS)


def add_drill_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a drill."""
    parser.add_argument("--vm", metavar="NAME", required=True, help="name or id of the VM that the drill is about")
    parser.add_argument(
        "--url",
        default=DEFAULT_URL,
        help=f"where the agent listens on this machine: http://HOST:PORT or unix:PATH (default: {DEFAULT_URL})",
    )


class SharedReader:
    """Lets several threads take looks by one reader, one at a time: a look takes some milliseconds."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()

    def read(self) -> Snapshot:
        """Take one look."""
        with self._lock:
            return self._reader.read()

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()


def open_watch(arguments: argparse.Namespace, reader: SnapshotReader, bpf: BpfSource | None) -> Watch:
    """Return the watch of this host; ``bpf`` reads registers where it is in use."""

    def make_trigger(on_call: Callable[[NotifyCall], None]) -> Trigger:
        return NotifyTrigger(on_call, function=arguments.trigger_function)

    means = Means(
        reader=reader,
        tracer=NotifyTracer(),
        read_vcpu=None if bpf is None else make_vcpu_reader(bpf.read_vcpu),
        hold=open_vm_process,
        is_thread=is_thread_of,
        make_trigger=make_trigger if arguments.trigger_bpf else None,
    )
    return Watch(means, rule=StallRule(arguments.stall_exits, arguments.stall_seconds), poll=arguments.poll)


def open_simulated_watch(arguments: argparse.Namespace, reader: SnapshotReader, host: SimulatedHost) -> Watch:
    """Return the watch of a made-up host."""
    means = Means(reader=reader, tracer=SimulatedTracer(host), read_vcpu=make_vcpu_reader(host.read_vcpu))
    return Watch(means, rule=StallRule(arguments.stall_exits, arguments.stall_seconds), poll=arguments.poll)


def make_vcpu_reader(
    read_vcpu: Callable[[VmKey, int], VcpuState | None],
) -> Callable[[VmKey, int], Reading | None]:
    """Return what reads a vCPU for the detector: its current registers, and counters."""

    def read(key: VmKey, vcpu_id: int) -> Reading | None:
        state = read_vcpu(key, vcpu_id)
        if state is None:
            return None
        counts = [state.statistics.get(name) for name in (NOTIFY_WINDOW_EXITS, EXITS)]
        if counts[0] is None or counts[1] is None:
            raise SourceUnavailable("this kernel does not describe its statistics of a vCPU")
        registers = {name: value for name, value in state.registers.items() if name not in state.stale}
        return Reading(registers, state.guest_mode, counts[0][0], counts[1][0])

    return read
