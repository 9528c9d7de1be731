"""``python -m tests.bench.bench_flood``: every vCPU of a host takes notify exits at once; what does the monitor cost?

For each shape of the same number of vCPUs: the CPU time of the stall monitor, in seconds for the onset of the flood, in
which it meets all vCPUs, in percent of a core after that, and in microseconds a call of the trigger; when it called the
one vCPU that is stuck, what was lost, and a scrape, without HTTP, beside one of the same host in quiet, with how many
lines each has.

Behind a hypervisor a CPU is slower by two thirds for seconds or minutes, when others use the same core. So fixed work
is timed before each scrape, and the ratio is that of the scrapes in units of it; what the flood does to caches stays.
The first scrapes of a flood make 50,000 lines for the first time: the longest stands in a column of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from exporter.build_info import BuildInfo
from exporter.commands.serve import GC_THRESHOLDS
from exporter.history.recorder import SnapshotRecorder
from exporter.monitor.backends import Backends
from exporter.monitor.stall_monitor import StallMonitor
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import open_self_metrics, render_document
from exporter.prometheus.negotiation import parse_accept
from exporter.prometheus.selection import CollectorSettings
from exporter.stalls.verdicts import StallRule
from exporter.wiring import open_host
from kvm.bpf.notify_trigger import NotifyCall
from tests.bench.crowd import open_crowd
from tests.bench.flooded_host import FloodedHost, FloodedTracer, FloodedTrigger
from tests.waiting import wait_until

# About as often as Prometheus scrapes. Each second, nine VMs in ten have nothing new to tell, and all is in a cache.
SCRAPE_SECONDS = 10.0
# Until everything about the VMs is found out, and all of their lines are made.
SETTLE_SECONDS = 6.0
QUIET_SECONDS = 60.0
ONSET_SECONDS = 3.0
PATIENCE_SECONDS = 120.0
YARDSTICK_STEPS = 30_000
NO_PROGRESS = "kvm_vcpu_no_forward_progress{"


class Scrapes:
    """Scrapes of one kind: how long each took, and how long fixed work took before it, in seconds of CPU."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.yardsticks: list[float] = []
        self.lines = 0

    @property
    def median(self) -> float:
        """In units of the fixed work."""
        pairs = zip(self.seconds, self.yardsticks, strict=True)
        return statistics.median(seconds / yardstick for seconds, yardstick in pairs)

    def __str__(self) -> str:
        """Return a column of the table."""
        median, least, most = (1e3 * of(self.seconds) for of in (statistics.median, min, max))
        return f"{median:5.1f} ms {f'({least:.1f} to {most:.1f}, {self.lines})':22}"


@dataclass
class Figures:
    """What one run has shown; times in seconds, of CPU but for ``called_after``."""

    onset: float = 0.0
    monitor: float = 0.0
    """After the onset, in ``seconds``."""
    seconds: float = 0.0
    told: int = 0
    lost: int = 0
    deferred: int = 0
    called_after: float | None = None
    called: list[str] = field(default_factory=list)
    settling: Scrapes = field(default_factory=Scrapes)
    quiet: Scrapes = field(default_factory=Scrapes)
    at_onset: Scrapes = field(default_factory=Scrapes)
    flooded: Scrapes = field(default_factory=Scrapes)
    of_bench: float = 0.0


def build_collector(recorder: SnapshotRecorder, monitor: StallMonitor) -> HostCollector:
    """Build what answers scrapes."""
    read_report = partial(monitor.report, with_verdicts=False)
    return HostCollector(recorder, CollectorSettings(), BuildInfo("0", "", "3"), time.perf_counter, read_report)


async def run(host: FloodedHost, seconds: float) -> Figures:
    """Run the monitor on a quiet host and then through a flood of so many seconds."""
    gc.collect()  # what the shape before has left is not this one's to look through
    gc.set_threshold(*GC_THRESHOLDS)
    figures = Figures()
    triggers: list[FloodedTrigger] = []

    def make_trigger(on_call: Callable[[NotifyCall], None]) -> FloodedTrigger:
        triggers.append(FloodedTrigger(host, on_call))
        return triggers[0]

    tracer, recorder = FloodedTracer(host), SnapshotRecorder(host)
    monitor = StallMonitor(Backends(reader=recorder, tracer=tracer, make_trigger=make_trigger), rule=StallRule())

    def count_cpu() -> float:
        of_flood = triggers[0].cpu_seconds + tracer.cpu_seconds
        of_scrapes = sum(figures.at_onset.seconds) + sum(figures.flooded.seconds)
        return time.process_time() - of_flood - of_scrapes - figures.of_bench

    collector = build_collector(recorder, monitor)
    warning = FirstWarning()
    logging.getLogger().addHandler(warning)
    stop, no_self_metrics, text_format = asyncio.Event(), open_self_metrics(False), parse_accept("")
    task = asyncio.create_task(monitor.run(stop))
    with ExitStack() as stack:
        worker = stack.enter_context(ThreadPoolExecutor(1))

        def scrape(scrapes: Scrapes) -> None:
            began = time.thread_time()
            scrapes.yardsticks.append(time_yardstick())
            started = time.thread_time()
            document = render_document(collector.collect(), no_self_metrics, text_format)
            seconds = time.thread_time() - started
            scrapes.seconds.append(seconds)
            text = b"".join(document).decode()
            figures.called = find_called(text) if host.began is not None else []
            scrapes.lines = text.count("\n")
            figures.of_bench += time.thread_time() - began - seconds

        async def live(until: float, scrapes: Scrapes, every: float = SCRAPE_SECONDS) -> None:
            loop, next_scrape = asyncio.get_running_loop(), 0.0
            while time.monotonic() < until:
                if time.monotonic() >= next_scrape:
                    next_scrape = time.monotonic() + every
                    await loop.run_in_executor(worker, scrape, scrapes)
                # Real time passes, in which the loop is the monitor's: that is what is measured.
                await asyncio.sleep(0.05)

        await live(time.monotonic() + SETTLE_SECONDS, figures.settling, 1.0)
        await live(time.monotonic() + QUIET_SECONDS, figures.quiet)
        host.begin()
        began, cpu = time.monotonic(), count_cpu()
        await live(began + ONSET_SECONDS, figures.at_onset, 1.0)
        figures.onset = count_cpu() - cpu
        await live(began + seconds, figures.flooded)
        figures.seconds = time.monotonic() - began - ONSET_SECONDS
        figures.monitor = count_cpu() - cpu - figures.onset
        report = monitor.report()
        figures.told, figures.lost, figures.deferred = triggers[0].told, report.lost_records, report.budget_exhausted
        if warning.at is not None:
            figures.called_after = warning.at - began
        stop.set()
        await task
    logging.getLogger().removeHandler(warning)
    if figures.called not in ([], [f'{NO_PROGRESS}vcpu="{host.stuck.vcpu_id}",vm="{host.stuck_vm}"}} 1']):
        raise RuntimeError(f"called stuck: {figures.called}")
    return figures


def time_yardstick() -> float:
    """Return how long fixed work takes at the present speed of the CPU."""
    started, total = time.thread_time(), 0
    for step in range(YARDSTICK_STEPS):
        total += step
    return time.thread_time() - started


def find_called(text: str) -> list[str]:
    """Find the vCPUs that a scrape calls stuck."""
    return [line for line in text.splitlines() if line.startswith(NO_PROGRESS) and line.endswith(" 1")]


class FirstWarning(logging.Handler):
    """Notes when the first vCPU was called in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.at: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        if record.getMessage() == "vCPU makes no forward progress" and self.at is None:
            self.at = time.monotonic()


def measure(vms: int, vcpus: int, seconds: float) -> Figures:
    """Measure one shape, over real vCPUs that stand still."""
    with open_crowd(vms, vcpus), ExitStack() as stack:
        reader = open_host(("bpf",), stack).reader
        wait_until(lambda: len(reader.read().readings) >= vms, "all VMs are known", PATIENCE_SECONDS)
        return asyncio.run(run(FloodedHost(vms, vcpus, reader.read), seconds))


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="625x16,10x1000")
    parser.add_argument("--seconds", type=float, default=80.0)
    arguments = parser.parse_args()
    print(
        "shape       onset   core   us/call   called after  lost  deferred  first scrapes"
        "  scrape (from, to, lines)         quiet (from, to, lines)         ratio"
    )
    for shape in arguments.shapes.split(","):
        vms, vcpus = map(int, shape.split("x"))
        got = measure(vms, vcpus, arguments.seconds)
        after = "never" if got.called_after is None else f"{got.called_after:.1f} s"
        print(
            f"{shape:10} {got.onset:4.2f} s {100 * got.monitor / got.seconds:5.1f} %"
            f"  {1e6 * (got.onset + got.monitor) / max(1, got.told):6.1f}"
            f"  {after:>12}  {got.lost:4}  {got.deferred:8}  {1e3 * max(got.at_onset.seconds):10.0f} ms"
            f"  {got.flooded}  {got.quiet}  {got.flooded.median / got.quiet.median:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
