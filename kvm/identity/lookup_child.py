"""Looks up VMs' owners in a process of its own, so that a lookup that hangs hangs alone.

Reading a command line can block on the process's mmap_lock, and a file below its root on a file system that never
answers, even SIGKILL-proof. The agent starts this program (``kvm/identity/lookup_process.py``), asks it for one process
at a time, and leaves it behind when it does not answer.

Requests and answers are lines of JSON on stdin and stdout; the program ends when its stdin does. It imports the
standard library only, and starts in some 60 ms.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from kvm.discovery.processes import read_stat
from kvm.errors import MalformedData, VmGone
from kvm.identity.owners import Problem, read_owner
from kvm.identity.vmm_cmdline import parse_cmdline

# What it reads is bounded (1 MiB of command line, 256 KiB of XML); this bounds what parsing them can take.
MEMORY_BYTES = 512 << 20
# Said once, before the first answer: from then on it is the lookup that takes its time, and not the start.
READY = b"ready\n"


def answer(request: bytes, proc: Path, cgroups: Path, libvirt_directories: Sequence[Path]) -> bytes:
    """Return one line of JSON for one: ``{"pid", "tid"}`` -> ``{"owner", "problems", "start_ticks"}``.

    ``owner`` is null where the process has ended or is ending. ``start_ticks`` is read last: where it is that of the
    process that was asked for, all before was read of that process too.
    """
    asked = json.loads(request)
    pid, tid = int(asked["pid"]), int(asked["tid"])
    found: dict[str, object] = {"owner": None, "problems": [], "start_ticks": None}
    try:
        owner, problems = read_owner(proc, pid, tid, libvirt_directories, cgroups)
        found = {
            "owner": asdict(owner),
            "problems": [list(problem) for problem in problems],
            "start_ticks": read_stat(proc, pid).start_ticks,
        }
    except (VmGone, MalformedData, OSError):
        pass  # it has ended or is ending: the caller asks again as long as the VM is there
    except Exception as err:  # noqa: BLE001 - whatever strangers' text breaks, the next process is asked for as well
        found["owner"] = asdict(parse_cmdline((), ""))
        found["problems"] = [list(Problem("unreadable", repr(err)))]
        found["start_ticks"] = asked["start_ticks"]
    return json.dumps(found).encode() + b"\n"


def serve(
    requests: BinaryIO, answers: BinaryIO, proc: Path, cgroups: Path, libvirt_directories: Sequence[Path]
) -> None:
    """Answer until there are no more requests."""
    for request in requests:
        answers.write(answer(request, proc, cgroups, libvirt_directories))
        answers.flush()


def main(words: Sequence[str]) -> int:
    """Serve stdin; ``words`` are where proc and cgroups are mounted, and libvirt's directories."""
    proc, cgroups, *directories = map(Path, words)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    serve(sys.stdin.buffer, sys.stdout.buffer, proc, cgroups, directories)
    return 0
