"""One child process that looks up owners (``kvm/identity/lookup_child.py``), as the agent sees it.

Nothing here waits for an answer: the pipes are non-blocking, and a child that does not answer is killed and left
behind. A process that hangs in the kernel may outlive its SIGKILL; ``has_ended`` tells.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvm.errors import KvmReadError
from kvm.identity.lookup_child import READY
from kvm.identity.owners import OwnerReading, Problem
from kvm.model import CpuTopology, Identity, Owner

# The longest answer: some texts of 4 KiB, each character escaped.
ANSWER_BYTES = 1 << 18
_PACKAGES = str(Path(__file__).parents[2])
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_PACKAGES!r}); "
    "from kvm.identity.lookup_child import main; sys.exit(main(sys.argv[1:]))"
)


class LookupPlaces(NamedTuple):
    """Where a child looks: where proc and the cgroups are mounted, and the directories of the host's libvirt."""

    proc: Path
    cgroups: Path
    libvirt_directories: tuple[Path, ...]

    @property
    def words(self) -> list[str]:
        """What its command line has for that."""
        return [str(self.proc), str(self.cgroups), *map(str, self.libvirt_directories)]


class LookupFailed(KvmReadError):
    """The child has ended, or speaks nonsense: what it was asked must be asked of another one."""


# Children that were killed and may hang on: kept, so that each is reaped, even when its cache is gone.
_unreaped: list[subprocess.Popen[bytes]] = []


class LookupProcess:
    """A child to be asked one thing at a time; ``fd`` is readable when its answer has come."""

    def __init__(self, places: LookupPlaces) -> None:
        """Start it; raises OSError."""
        # -I and -S: nothing of the environment, of the current directory or of site-packages comes in.
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, *places.words]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # Ctrl-C is for the agent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._received = b""
        self.is_ready = False
        """Whether it has started: on a busy machine, or an emulated one, that takes longer than any lookup."""

    @property
    def fd(self) -> int:
        """The end of the pipe from which answers are read."""
        return self._answers

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left of it."""
        return self._process.poll() is not None

    def open_pidfd(self) -> int:
        """Return an fd that is readable once it has ended; raises OSError, also where it was reaped."""
        return os.pidfd_open(self._process.pid)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended, and reap it; for at most so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def ask(self, pid: int, tid: int, start_ticks: int) -> None:
        """Ask whose VM a process is; raises LookupFailed."""
        line = json.dumps({"pid": pid, "tid": tid, "start_ticks": start_ticks}).encode() + b"\n"
        try:
            written = os.write(self._requests, line)
        except OSError as err:
            raise LookupFailed(f"the lookup process does not listen: {err.strerror}") from err
        if written != len(line):
            raise LookupFailed("the lookup process does not listen")

    def read_answer(self, start_ticks: int) -> tuple[bool, OwnerReading | None]:
        """Return whether there is an answer, and what it is: None where that process has ended or is ending.

        Raises LookupFailed.
        """
        try:
            piece = os.read(self._answers, ANSWER_BYTES)
        except BlockingIOError:
            return False, None
        except OSError as err:
            raise LookupFailed(f"the lookup process cannot be read: {err.strerror}") from err
        if not piece:
            raise LookupFailed("the lookup process has ended")
        self._received += piece
        if not self.is_ready and self._received.startswith(READY):
            self.is_ready, self._received = True, self._received.removeprefix(READY)
            if not self._received:
                return self.read_answer(start_ticks)  # or its end, if that has come as well
        if not self._received.endswith(b"\n"):
            if len(self._received) > ANSWER_BYTES:
                raise LookupFailed("the lookup process says too much")
            return False, None
        line, self._received = self._received, b""
        return True, decode_answer(line, start_ticks)

    def leave(self) -> None:
        """Kill it, and wait for nothing: what hangs in the kernel ends when that lets it go."""
        self._process.kill()
        _unreaped[:] = [process for process in _unreaped if process.poll() is None]
        _unreaped.append(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def decode_answer(line: bytes, start_ticks: int) -> OwnerReading | None:
    """Return what an answer says of the process that started then; raises LookupFailed."""
    try:
        found = json.loads(line)
        if found["owner"] is None or found["start_ticks"] != start_ticks:
            return None
        facts = found["owner"]
        facts["identity"] = Identity(facts["identity"])
        facts["cpu_topology"] = CpuTopology(*facts["cpu_topology"]) if facts["cpu_topology"] else None
        return OwnerReading(Owner(**facts), tuple(Problem(*problem) for problem in found["problems"]))
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise LookupFailed(f"the lookup process speaks nonsense: {err!r}") from err
