"""``make bench``: one scrape of 10,000 vCPUs by the real agent, beside a plain C program, in one run.

Absolute times differ from machine to machine and from minute to minute; the ratios of one run are what counts. C and
agent take turns, and medians are compared. C finds the vCPUs once and then duplicates, reads, closes and prints two
series a vCPU; the agent answers whole scrapes over HTTP, request to last byte, with everything else that it exports.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.crowd import open_crowd
from tests.waiting import wait_until

ROUNDS = 15
SOURCE = Path(__file__).with_name("reference_scrape.c")
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Measured:
    """Medians in seconds, but for ``resident_bytes`` and ``start_seconds`` (process start to first good scrape)."""

    find_seconds: float
    c_seconds: float
    scrape_seconds: float
    cpu_seconds: float
    start_seconds: float
    resident_bytes: int
    series: int


class Agent:
    """A running agent that listens on a Unix socket."""

    def __init__(self, pid: int, path: Path) -> None:
        self._process = psutil.Process(pid)
        self._path = path

    def scrape(self) -> tuple[float, bytes]:
        """Scrape once; returns seconds from request to last byte, and the answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._path))
            started = time.perf_counter()
            client.sendall(REQUEST)
            pieces = []
            while piece := client.recv(1 << 20):
                pieces.append(piece)
            return time.perf_counter() - started, b"".join(pieces)

    def read_cpu_seconds(self) -> float:
        """Read the CPU time that the agent has used, all threads."""
        times = self._process.cpu_times()
        return times.user + times.system

    def read_resident_bytes(self) -> int:
        """Read the agent's resident memory."""
        return self._process.memory_info().rss


@contextmanager
def open_agent(directory: Path, source: str) -> Iterator[Agent]:
    """Run the agent with one source; wait until it answers."""
    path = directory / "agent.sock"
    words = [sys.executable, "-m", "exporter", "serve", f"--web.listen-address=unix:{path}"]
    words += [f"--collector.source={source}", "--log.level=warn"]
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


def run_reference(binary: Path, rounds: int) -> tuple[int, float, float]:
    """Run the C program; returns vCPUs found, seconds to find them, and the median round in seconds."""
    lines = subprocess.run([binary, str(rounds)], capture_output=True, text=True, check=True).stdout.split("\n")
    found, find_ms = lines[0].split()
    return int(found), float(find_ms) / 1e3, statistics.median(float(line) for line in lines[1:] if line) / 1e3


def measure(binary: Path, source: str, vcpus: int) -> Measured:
    """Measure one source against C, on whatever runs now; ``vcpus`` must all be there."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        with open_agent(Path(directory), source) as agent:
            start_seconds = time.perf_counter() - started
            scrapes, rounds, cpu_before, finds = [], [], agent.read_cpu_seconds(), []
            for _ in range(ROUNDS):
                found, find_seconds, c_seconds = run_reference(binary, 1)
                if found < vcpus:
                    raise RuntimeError(f"the C program found {found} of {vcpus} vCPUs")
                rounds.append(c_seconds)
                finds.append(find_seconds)
                seconds, answer = agent.scrape()
                scrapes.append(seconds)
            series = answer.count(b"\nkvm_vcpu_exits_total{") + answer.count(b"\nkvm_vcpu_notify_window_exits_total{")
            if series < 2 * vcpus:
                raise RuntimeError(f"{source}: the agent gave {series} of {2 * vcpus} series")
            return Measured(
                statistics.median(finds),
                statistics.median(rounds),
                statistics.median(scrapes),
                (agent.read_cpu_seconds() - cpu_before) / ROUNDS,
                start_seconds,
                agent.read_resident_bytes(),
                series,
            )


def main() -> None:
    """Print the figures, bare and with 300 eventfds in each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    parser.add_argument("--sources", default="bpf,stats_fd")
    parser.add_argument("--settle-seconds", type=float, default=31, help="wait until no process is young any more")
    arguments = parser.parse_args()
    total = arguments.vms * arguments.vcpus
    print(f"{total} vCPUs in {arguments.vms} processes; medians of {ROUNDS} scrapes", flush=True)
    header = "eventfds  source    C find  C read+print  scrape  ratio to C  agent CPU/scrape  start  resident"
    print(header, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "reference_scrape"
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(binary), str(SOURCE)], check=True)
        for eventfds in (0, 300):
            with open_crowd(arguments.vms, arguments.vcpus, eventfds):
                time.sleep(arguments.settle_seconds)
                for source in arguments.sources.split(","):
                    got = measure(binary, source, total)
                    print(
                        f"{eventfds:8}  {source:8}  {got.find_seconds * 1e3:3.0f} ms  {got.c_seconds * 1e3:9.1f} ms"
                        f"  {got.scrape_seconds * 1e3:3.0f} ms  {got.scrape_seconds / got.c_seconds:10.2f}"
                        f"  {got.cpu_seconds * 1e3:13.0f} ms  {got.start_seconds:3.1f} s"
                        f"  {got.resident_bytes / 1e6:5.0f} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
