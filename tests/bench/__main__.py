"""``make bench``: one scrape of 10,000 vCPUs by the real agent, beside a plain C program, in one run.

Absolute times differ from machine to machine and from minute to minute; the ratios of one run are what counts. C and
agent take turns, and each round has a ratio of its own: their median is told, with the least and the greatest. CPU time
suffers least from what else runs on the machine. C finds the vCPUs once and then duplicates, reads, closes and prints
two series a vCPU; the agent answers whole scrapes over HTTP, request to last byte, with everything else that it
exports.

Where counters are ``still``, no guest runs, and the agent has most lines ready. Where they ``move``, each vCPU takes a
VM exit before each round.

50,000 vCPUs (``--vms=3125``) take 11 GB, and 0.35 MB more each once they have run: ``--running`` says how many of the
VMs do. The others are there, and stand still.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvm.discovery.vm_discovery import YOUNG_SECONDS
from tests.bench.crowd import Crowd, open_crowd
from tests.verifier_bill import MOST, read_bill
from tests.waiting import wait_until

ROUNDS = 15
SOURCE = Path(__file__).with_name("reference_scrape.c")
REQUEST = "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nAccept-Encoding: {}\r\n\r\n"
HEADER = (
    "eventfds  source    counters   coding    C find  C round  scrape  ratio to C (least, greatest)"
    "   C CPU  agent CPU  ratio to C (least, greatest)  start  resident"
)


@dataclass(frozen=True)
class Round:
    """One round of the C program: vCPUs found, and how long finding and the rest took, in seconds."""

    vcpus: int
    find_seconds: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Scrape:
    """One scrape: from request to last byte, and the CPU time of all of the agent's threads meanwhile."""

    seconds: float
    cpu_seconds: float
    answer: bytes


class Agent:
    """A running agent that listens on a Unix socket."""

    def __init__(self, pid: int, path: Path) -> None:
        self._process = psutil.Process(pid)
        self._path = path

    def scrape(self, coding: str = "identity") -> Scrape:
        """Scrape once."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._path))
            cpu_before, started = read_cpu_seconds(self._process.pid), time.perf_counter()
            client.sendall(REQUEST.format(coding).encode())
            pieces = []
            while piece := client.recv(1 << 20):
                pieces.append(piece)
            seconds = time.perf_counter() - started
            return Scrape(seconds, read_cpu_seconds(self._process.pid) - cpu_before, b"".join(pieces))

    def read_resident_bytes(self) -> int:
        """Read the agent's resident memory."""
        return self._process.memory_info().rss


def read_cpu_seconds(pid: int) -> float:
    """Read the CPU time of a process's threads, to the nanosecond; cpu_times() would tell hundredths of seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def open_agent(directory: Path, source: str, *flags: str) -> Iterator[Agent]:
    """Run the agent with one source; wait until it answers."""
    path = Path(tempfile.mkdtemp(dir=directory)) / "agent.sock"
    words = [sys.executable, "-m", "exporter", "serve", f"--web.listen-address=unix:{path}"]
    words += [f"--collector.source={source}", "--log.level=warn", *flags]
    with subprocess.Popen(words) as process:
        try:
            agents: list[Agent] = []

            def answers() -> bool:
                with contextlib.suppress(OSError):  # it does not listen yet
                    agent = Agent(process.pid, path)
                    agent.scrape()
                    agents.append(agent)
                return bool(agents) or process.poll() is not None

            wait_until(answers, "the agent answers", 60)
            if not agents:
                raise RuntimeError(f"the agent has ended with {process.returncode}")
            yield agents[0]
        finally:
            process.terminate()


def settle(source: str) -> None:
    """Wait until an agent that has just been opened takes no process for a new one.

    Where BPF does not list the VMs, it reads of each process that it has known for less than ``YOUNG_SECONDS`` at every
    snapshot which fds it has: that is what a scrape costs in the first half minute of an agent, and not later.
    """
    if source != "bpf":
        time.sleep(YOUNG_SECONDS)


def run_reference(binary: Path) -> Round:
    """Run the C program."""
    find, round_ = subprocess.run([binary, "1"], capture_output=True, text=True, check=True).stdout.splitlines()
    vcpus, find_ms = find.split()
    ms, cpu_ms = round_.split()
    return Round(int(vcpus), float(find_ms) / 1e3, float(ms) / 1e3, float(cpu_ms) / 1e3)


def measure(agent: Agent, binary: Path, crowd: Crowd, vcpus: int, *, running: int, coding: str) -> str:
    """Let C and agent take turns; returns the figures, in the order of ``HEADER``. ``vcpus`` must all be there."""
    rounds, scrapes = [], []
    for _ in range(ROUNDS):
        if running:
            crowd.run(running)
        rounds.append(run_reference(binary))
        scrapes.append(agent.scrape(coding))
        if rounds[-1].vcpus < vcpus:
            raise RuntimeError(f"the C program found {rounds[-1].vcpus} of {vcpus} vCPUs")
    find, wall, cpu = (
        statistics.median(getattr(round_, name) for round_ in rounds) * 1e3
        for name in ("find_seconds", "seconds", "cpu_seconds")
    )
    agent_wall, agent_cpu = (
        statistics.median(getattr(scrape, name) for scrape in scrapes) * 1e3 for name in ("seconds", "cpu_seconds")
    )
    wall_ratio = describe([scrape.seconds / round_.seconds for scrape, round_ in zip(scrapes, rounds, strict=True)])
    cpu_ratio = describe(
        [scrape.cpu_seconds / round_.cpu_seconds for scrape, round_ in zip(scrapes, rounds, strict=True)]
    )
    return (
        f"{find:5.0f} ms  {wall:4.1f} ms {agent_wall:4.1f} ms  {wall_ratio}"
        f"  {cpu:4.1f} ms  {agent_cpu:6.1f} ms  {cpu_ratio}"
    )


def is_complete(answer: bytes, vcpus: int) -> bool:
    """Tell whether a scrape has two series of each vCPU: of new VMs only once their owners are known."""
    series = answer.count(b"\nkvm_vcpu_exits_total{") + answer.count(b"\nkvm_vcpu_notify_window_exits_total{")
    return series >= 2 * vcpus


def wait_for_all(agent: Agent, vcpus: int) -> None:
    """Wait until the agent tells of every vCPU."""
    wait_until(lambda: is_complete(agent.scrape().answer, vcpus), "all vCPUs are told", 120)


def describe(ratios: Sequence[float]) -> str:
    """Describe the ratios of all rounds: the median, the least and the greatest."""
    return f"{statistics.median(ratios):10.2f} ({min(ratios):.2f}, {max(ratios):.2f})     "


def print_bill() -> None:
    """Print what this kernel's verifier has to do for the programs that read counters; of others, the lab does."""
    bill = dict(read_bill())
    most = max(bill, key=lambda name: bill[name])
    print(f"verified instructions on Linux {os.uname().release}: at most {bill[most]} ({most}); the goal is {MOST}")


def main() -> None:
    """Print the figures, bare and with 300 eventfds in each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    parser.add_argument("--running", type=int, help="how many of the VMs run; by default all")
    parser.add_argument("--sources", default="bpf,stats_fd")
    parser.add_argument("--eventfds", default="0,300")
    arguments = parser.parse_args()
    total = arguments.vms * arguments.vcpus
    running = arguments.vms if arguments.running is None else arguments.running
    modes = ((0, "identity"), *([(running, "identity"), (running, "gzip")] if running else [(0, "gzip")]))
    if "bpf" in arguments.sources.split(","):
        print_bill()
    print(f"{total} vCPUs in {arguments.vms} processes; medians of {ROUNDS} scrapes\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        binary = directory / "reference_scrape"
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(binary), str(SOURCE)], check=True)
        for eventfds in arguments.eventfds.split(","):
            with open_crowd(arguments.vms, arguments.vcpus, int(eventfds)) as crowd:
                crowd.run(running)  # the first run of a guest makes its page tables
                for source in arguments.sources.split(","):
                    started = time.perf_counter()
                    with open_agent(directory, source) as agent:
                        start_seconds = time.perf_counter() - started
                        settle(source)
                        wait_for_all(agent, total)
                        for now_running, coding in modes:
                            row = measure(agent, binary, crowd, total, running=now_running, coding=coding)
                            counters = f"{now_running} move" if now_running not in (0, arguments.vms) else ""
                            counters = counters or ("moving" if now_running else "still")
                            print(
                                f"{eventfds:>8}  {source:8}  {counters:9}  {coding:8}  {row}"
                                f"  {start_seconds:3.1f} s  {agent.read_resident_bytes() / 1e6:5.0f} MB",
                                flush=True,
                            )


if __name__ == "__main__":
    main()
