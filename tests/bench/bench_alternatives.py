"""``python -m tests.bench.bench_alternatives``: what would be run instead of the agent, on the same VMs, in CPU time.

Each takes turns with a scrape of the agent, and each round has a ratio of its own: how many scrapes it costs. Medians
are told, with the least and the greatest; every vCPU takes a VM exit before each round. What does not run says why.

- ``C program``: one round of ``reference_scrape.c``, its finding of the vCPUs left out;
- ``textfile``: what cron and node_exporter do for a scrape: ``once`` writes a file, node_exporter reads and serves it;
- ``kvm_stat -1 -d``: tools/kvm/kvm_stat of the kernel's sources, which prints sums over the host from debugfs. It does
  not start where /proc/cpuinfo has neither vmx nor svm; there it is told that there is svm;
- ``pmdakvm``: PCP's, asked for all that it has by ``pminfo``.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests import own_mounts
from tests.bench.__main__ import SOURCE, describe, open_agent, read_cpu_seconds, run_reference
from tests.bench.crowd import open_crowd
from tests.live.prometheus_server import find_free_port
from tests.waiting import wait_until

ROUNDS = 7
NODE_EXPORTERS = ("prometheus-node-exporter", "node_exporter")
CPUINFO = Path("/proc/cpuinfo")
SEE_CPUINFO = f'mount --bind "$0" {CPUINFO} && exec "$@"'


class DoesNotRun(Exception):
    """It cannot be measured here, and why."""


def time_program(words: Sequence[str | Path]) -> float:
    """Run a program and return its CPU time in seconds; raises DoesNotRun."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-3:] or [f"it ends with {ended.returncode}"]
        raise DoesNotRun(" ".join(said))
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def find_program(names: Sequence[str], remedy: str) -> str:
    """Return the first of these programs that is there; raises DoesNotRun."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise DoesNotRun(f"not installed: {remedy}")
    return found


def open_kvm_stat(directory: Path, kvm_stat: str) -> Callable[[], float]:
    """Give what measures kvm_stat; on a CPU that it does not know it sees a cpuinfo of its own."""
    words: list[str | Path] = [sys.executable, kvm_stat, "-1", "-d"]
    cpuinfo = CPUINFO.read_text()
    flags = {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}
    if not flags & {"vmx", "svm"}:
        told = directory / "cpuinfo"
        told.write_text(re.sub(r"^flags\s*:", r"\g<0> svm", cpuinfo, flags=re.MULTILINE))
        words = ["unshare", "--mount", "sh", "-c", SEE_CPUINFO, told, *words]
    return partial(time_program, words)


@contextmanager
def open_textfile(directory: Path) -> Iterator[Callable[[], float]]:
    """Run node_exporter with its textfile collector alone; gives what measures one file written, read and served."""
    program = find_program(NODE_EXPORTERS, "apt install prometheus-node-exporter")
    url = f"127.0.0.1:{find_free_port()}"
    words = [program, f"--web.listen-address={url}", "--collector.disable-defaults", "--collector.textfile"]
    words.append(f"--collector.textfile.directory={directory}")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:

        def scrape() -> bytes:
            with urllib.request.urlopen(f"http://{url}/metrics") as answer:
                document: bytes = answer.read()
            return document

        def answers() -> bool:
            try:
                return bool(scrape())
            except OSError:
                return False

        def measure() -> float:
            words = [sys.executable, "-m", "exporter", "once", f"--output={directory / 'kvm.prom'}"]
            written = time_program([*words, "--log.level=error"])
            before = read_cpu_seconds(process.pid)
            if b"kvm_vcpu_exits_total{" not in scrape():
                raise RuntimeError("node_exporter does not serve what was written")
            return written + read_cpu_seconds(process.pid) - before

        try:
            wait_until(answers, "node_exporter answers")
            yield measure
        finally:
            process.terminate()


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=625)
    parser.add_argument("--vcpus", type=int, default=16)
    parser.add_argument("--kvm-stat", help="where kvm_stat is; by default it is looked for in PATH")
    arguments = parser.parse_args()
    print(f"{arguments.vms * arguments.vcpus} vCPUs in {arguments.vms} processes; medians of {ROUNDS} rounds, CPU time")
    print("instead           agent     instead    ratio to the agent's scrape (least, greatest)", flush=True)
    own_mounts.enter()  # kvm_stat reads debugfs
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        binary = directory / "reference_scrape"
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(binary), str(SOURCE)], check=True)
        (directory / "textfiles").mkdir()
        crowd = stack.enter_context(open_crowd(arguments.vms, arguments.vcpus))
        crowd.run()  # the first run of a guest makes its page tables
        agent = stack.enter_context(open_agent(directory, "bpf"))

        def find_kvm_stat() -> str:
            where = "tools/kvm/kvm_stat of the kernel's sources, by --kvm-stat=PATH"
            return arguments.kvm_stat or find_program(["kvm_stat"], where)

        def open_pmdakvm() -> Callable[[], float]:
            return partial(time_program, [find_program(["pminfo"], "apt install pcp"), "--fetch", "kvm"])

        ways: dict[str, Callable[[], Callable[[], float]]] = {
            "C program": lambda: lambda: run_reference(binary).cpu_seconds,
            "textfile": lambda: stack.enter_context(open_textfile(directory / "textfiles")),
            "kvm_stat -1 -d": lambda: open_kvm_stat(directory, find_kvm_stat()),
            "pmdakvm": open_pmdakvm,
        }
        for name, open_way in ways.items():
            ours, theirs = [], []
            try:
                measure = open_way()
                for _ in range(ROUNDS):
                    crowd.run()
                    theirs.append(measure())
                    ours.append(agent.scrape().cpu_seconds)
            except DoesNotRun as err:
                print(f"{name:14}  does not run here: {err}", flush=True)
                continue
            before, after = (statistics.median(times) * 1e3 for times in (ours, theirs))
            ratios = describe([instead / own for instead, own in zip(theirs, ours, strict=True)])
            print(f"{name:14} {before:6.1f} ms {after:8.1f} ms {ratios}", flush=True)


if __name__ == "__main__":
    main()
