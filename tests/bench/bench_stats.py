"""``python -m tests.bench.bench_stats``: what ``--collector.stats`` adds to a scrape, in CPU time.

Agents with and without it take turns, on the same VMs; each round has a ratio of its own, and their median is told,
with the least and the greatest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.bench.__main__ import Agent, describe, open_agent, settle
from tests.bench.crowd import Crowd, open_crowd

ROUNDS = 15
# Those that explain why a guest is slow, as the dashboards show them.
TEN = (
    *("exits", "halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns", "irq_injections", "pf_taken", "pf_fixed"),
    *("tlb_flush", "preemption_reported", "request_irq_exits"),
)
INCLUDE_TEN = f"--collector.stats.include=^vcpu/({'|'.join(TEN)})$"
WAYS = {
    "off": (),
    "ten": ("--collector.stats", INCLUDE_TEN),
    "all but histograms": ("--collector.stats", "--collector.stats.exclude=_hist$"),
    "all": ("--collector.stats",),
    "ten of each vCPU": ("--collector.stats", INCLUDE_TEN, "--collector.stats.level=vcpu"),
}


def compare(without: Agent, with_it: Agent, crowd: Crowd, *, moving: bool) -> str:
    """Let the two take turns, and describe what they took."""
    ratios, base, more = [], [], []
    for number in range(ROUNDS):
        if moving:
            crowd.run()
        pair = [without, with_it] if number % 2 else [with_it, without]
        seconds = {agent: agent.scrape().cpu_seconds for agent in pair}
        base.append(seconds[without])
        more.append(seconds[with_it])
        ratios.append(seconds[with_it] / seconds[without])
    before, after = (statistics.median(times) * 1e3 for times in (base, more))
    return f"{before:6.1f} ms {after:6.1f} ms {describe(ratios)}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    parser.add_argument("--source", default="bpf")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, by name")
    arguments = parser.parse_args()
    print(
        f"{arguments.vms * arguments.vcpus} vCPUs in {arguments.vms} processes; medians of {ROUNDS} scrapes, CPU time"
    )
    print("statistics          counters   without      with        ratio (least, greatest)", flush=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        crowd = stack.enter_context(open_crowd(arguments.vms, arguments.vcpus))
        crowd.run()  # the first run of a guest makes its page tables
        without = stack.enter_context(open_agent(directory, arguments.source))
        for name in arguments.ways.split(","):
            with open_agent(directory, arguments.source, *WAYS[name]) as with_it:
                settle(arguments.source)
                for moving in (False, True):
                    text = compare(without, with_it, crowd, moving=moving)
                    print(f"{name:18}  {'moving' if moving else 'still':8} {text}", flush=True)


if __name__ == "__main__":
    main()
