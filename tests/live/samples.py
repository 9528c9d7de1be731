"""The outputs that the documents show: two guests of real QEMUs, and what the commands print beside them.

``python -m tests.live.samples`` prints them all, to be put into the documents by hand, on a host that runs no other VM.
``tests/live/test_samples.py`` holds the documents to them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.agents import open_agent, run_agent
from tests.lab.debian import find_qemu10
from tests.waiting import wait_until

UUID = "6f1c3c52-0d7a-4a4f-9a4e-0d8f9f2c7b11"
METRICS = r"^(kvm_vcpu_|kvm_vm_info)"
START_SECONDS = 60.0


@contextmanager
def open_guest(binary: Path | str, name: str, *words: str) -> Iterator[int]:
    """Run a QEMU whose firmware finds nothing to boot; its pid."""
    machine = ["-accel", "kvm", "-smp", "2", "-m", "64", "-nodefaults", "-display", "none"]
    command = [str(binary), *machine, "-name", f"guest={name},debug-threads=on", *words]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@contextmanager
def open_guests() -> Iterator[list[int]]:
    """Run the two guests of the documents: QEMU 10 with a UUID, QEMU 7.2 without one; their pids."""
    old = shutil.which("qemu-system-x86_64")
    if old is None:
        raise RuntimeError("Debian's package qemu-system-x86 is not installed")
    with ExitStack() as stack:
        pids = [stack.enter_context(open_guest(find_qemu10(), "web-1", "-uuid", UUID))]
        pids.append(stack.enter_context(open_guest(old, "old-1")))
        wait_until(lambda: len(find_rows(run_once(), pids)) == 4, "both guests have two vCPUs", START_SECONDS)
        yield pids


def run_once() -> str:
    """Return what ``once`` prints of this host, whatever else runs here."""
    return run_agent("once", expect=(0, 1))


def find_rows(table: str, pids: list[int]) -> list[list[str]]:
    """Return the rows of a table of ``once`` that are about these processes, cell by cell."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return [row for row in rows if {str(pid) for pid in pids} & set(row)]


def read_metrics() -> list[str]:
    """Return the lines that ``grep`` with METRICS leaves of a scrape."""
    with open_agent() as agent:
        return [line for line in agent.get()[2].decode().splitlines() if re.match(METRICS, line)]


def main() -> None:
    with open_guests():
        print(run_once())
        print("\n".join(read_metrics()), end="\n\n")
        print(run_agent("check", expect=(0, 1)))


if __name__ == "__main__":
    main()
