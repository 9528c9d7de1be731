"""``python -m tests.bench.bench_blindness``: what it costs a scrape to say what it does not see.

Two collectors read the same crowd through the source ``bpf`` in one process and take turns, and who is first changes
each time. One is the agent's; of the other all is taken that tells whether VMs may be missing, how old a snapshot is,
whether KVM has been loaded anew, and which vCPUs have lost their context. CPU time of this thread alone, kernel and
Python, from snapshot to text.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterable

from exporter.build_info import BuildInfo
from exporter.prometheus.collector import HostCollector
from exporter.prometheus.exposition import Family, render_text
from exporter.prometheus.selection import CollectorSettings
from exporter.stalls.verdicts import MonitorReport
from exporter.wiring import open_host
from kvm.blind_spots import Evidence
from kvm.bpf.bpf_object import BpfObject
from kvm.bpf.libbpf import open_library
from kvm.bpf.notify_trigger import MAX_THREADS
from kvm.bpf.vcpu_programs import OBJECT
from kvm.model import BlindSpot
from kvm.snapshot import HostReader
from tests.bench.crowd import open_crowd

PAIRS = 400
BUILD = BuildInfo("1", "2", "3")
SEES_ALL = Evidence(initial_pid_namespace=True, works=True, finds_vms=True)


class NoBlindSpotLog:
    def log_new(self, spots: Iterable[BlindSpot], now: float) -> None:
        """Says nothing."""


class HeedlessReader(HostReader):
    """Does not ask itself what it may have missed."""

    def _follow_kvm(self) -> None:
        pass

    def _find_evidence(self) -> Evidence:
        return SEES_ALL


class HeedlessCollector(HostCollector):
    """Says nothing of it."""

    def _collect_completeness(self) -> list[Family]:
        return []


def measure(collect: Callable[[], list[Family]]) -> float:
    """CPU seconds of one scrape, kernel and Python."""
    began = time.thread_time()
    render_text(collect())
    return time.thread_time() - began


def make_pair(stack: contextlib.ExitStack) -> tuple[HostCollector, HostCollector]:
    """The agent's collector, and the one that does not care."""
    counts = BpfObject(open_library(), OBJECT)
    counts.set_entries("unowned_vms", MAX_THREADS)
    counts.load()
    stack.callback(counts.close)

    def read_report() -> MonitorReport:
        # A hash map like that of the trigger, which this host may not let be attached, and as empty as on a well host.
        counts.read_map("unowned_vms", 8, 16)
        return MonitorReport(context_invalid={})

    readers = [open_host(("bpf",), stack).reader for _ in range(2)]
    heedless = readers[1]
    heedless.__class__ = HeedlessReader
    vars(heedless)["_blind_spot_log"] = NoBlindSpotLog()
    settings = CollectorSettings()
    knowing = HostCollector(readers[0], settings, BUILD, time.perf_counter, read_report)
    return knowing, HeedlessCollector(heedless, settings, BUILD, time.perf_counter, MonitorReport)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    with open_crowd(arguments.vms, arguments.vcpus, 0), contextlib.ExitStack() as stack:
        pair = make_pair(stack)
        for collector in pair * 20:
            measure(collector.collect)
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(arguments.pairs):
            for one in (0, 1) if number % 2 else (1, 0):
                times[one].append(measure(pair[one].collect))
    (with_it, without), (least, least_without) = map(statistics.median, times), map(min, times)
    share = statistics.median(a / b for a, b in zip(*times, strict=True)) - 1
    print(f"{arguments.vms * arguments.vcpus} vCPUs, {arguments.pairs} pairs of scrapes, CPU time")
    print(f"  median {with_it * 1e3:.2f} ms, without {without * 1e3:.2f} ms: {with_it / without - 1:+.2%}")
    print(f"  least  {least * 1e3:.2f} ms, without {least_without * 1e3:.2f} ms: {least / least_without - 1:+.2%}")
    print(f"  median of the pairs' ratios: {share:+.2%}")


if __name__ == "__main__":
    main()
