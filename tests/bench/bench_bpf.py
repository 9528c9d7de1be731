"""``python -m tests.bench.bench_bpf``: the eBPF source alone, each way to find VMs, beside the plain C program.

C and source take turns in one run; medians are compared. CPU time is split into kernel (the BPF programs) and user
(Python): both of this thread alone.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvm.counters.bpf import BpfSource
from tests.bench.__main__ import SOURCE, run_reference
from tests.bench.crowd import open_crowd

ROUNDS = 15


@dataclass(frozen=True)
class ReadTimes:
    """Medians in seconds of one snapshot: wall, CPU in the kernel, CPU in Python; and the C program's round."""

    method: str
    vcpus: int
    open_seconds: float
    wall_seconds: float
    kernel_seconds: float
    user_seconds: float
    c_seconds: float


def measure_reads(make: Callable[[], BpfSource], binary: Path, rounds: int = ROUNDS) -> ReadTimes:
    """Measure reads of whatever VMs there are now, each after a round of the C program ``binary``."""
    source = make()
    started = time.perf_counter()
    source.open()
    open_seconds = time.perf_counter() - started
    try:
        source.read()  # the first read finds the fd of each VM's file; they are checked from then on
        walls, kernels, users, references, vcpus = [], [], [], [], 0
        for _ in range(rounds):
            references.append(run_reference(binary).seconds)
            before, started = resource.getrusage(resource.RUSAGE_THREAD), time.perf_counter()
            found = source.read()
            walls.append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_THREAD)
            kernels.append(after.ru_stime - before.ru_stime)
            users.append(after.ru_utime - before.ru_utime)
            vcpus = sum(len(counters.vcpu_ids) for counters in found.values())
        medians = (statistics.median(times) for times in (walls, kernels, users, references))
        return ReadTimes(source.method, vcpus, open_seconds, *medians)
    finally:
        source.close()


def main() -> None:
    """Print the figures, bare and with 300 eventfds in each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    arguments = parser.parse_args()
    print("eventfds  method  vCPUs  open     read      kernel    Python    C         ratio to C", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "reference_scrape"
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(binary), str(SOURCE)], check=True)
        for eventfds in (0, 300):
            with open_crowd(arguments.vms, arguments.vcpus, eventfds):
                for make in (BpfSource, lambda: BpfSource(with_list=False)):
                    got = measure_reads(make, binary)
                    times = (got.wall_seconds, got.kernel_seconds, got.user_seconds, got.c_seconds)
                    columns = "  ".join(f"{seconds * 1e3:5.1f} ms" for seconds in times)
                    ratio = got.wall_seconds / got.c_seconds
                    print(
                        f"{eventfds:8}  {got.method:6}  {got.vcpus:5}  {got.open_seconds * 1e3:3.0f} ms  {columns}"
                        f"  {ratio:10.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
