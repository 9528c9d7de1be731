"""Tests against a real ``/dev/kvm``, and how they start a guest of ``tiny_guest.py`` as a process of its own.

A VMM is another process than the agent, so the guest has to be one as well: only then do /proc,
ptrace rights, pidfds and thread ids behave as on a host.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from tests.live import tiny_guest

ANSWER_SECONDS = 60.0
# So many exits besides its own may be counted while a guest makes a thousand: it halts, it enters KVM_RUN anew, and on
# kvm_pvm each interrupt of the host ends a run, some dozens where three vCPUs share two CPUs.
OTHER_EXITS = 100


class GuestError(Exception):
    """The guest's process ended or did not answer; the message ends with what it wrote to stderr."""


@dataclass(frozen=True)
class GuestVcpu:
    """One vCPU as its VMM knows it."""

    index: int
    vcpu_id: int
    tid: int
    fd: int
    stats_fd: int


class GuestProcess:
    """A running tiny guest; made by `open_guest_process`, which also ends it."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self.process = process
        self._stderr = stderr
        self._unread = b""
        self._set_aside: list[dict[str, Any]] = []
        ready = self.wait_for("ready")
        self.pid: int = ready["pid"]
        self.vm_fd: int = ready["vm_fd"]
        self.vm_stats_fd: int = ready["vm_stats_fd"]
        self.creator_tid: int = ready["creator_tid"]
        self.vcpus = [GuestVcpu(**vcpu) for vcpu in ready["vcpus"]]

    def wait_for(self, event: str, timeout_seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Returns the next answer of that kind; others are kept for later calls."""
        for position, kept in enumerate(self._set_aside):
            if kept["event"] == event:
                return self._set_aside.pop(position)
        deadline = time.monotonic() + timeout_seconds
        while True:
            fields: dict[str, Any] = json.loads(self._read_line(deadline, event))
            if fields["event"] == event:
                return fields
            self._set_aside.append(fields)

    def _read_line(self, deadline: float, awaited: str) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise GuestError(f"no {awaited!r} from the guest in time; {self._last_words()}")
            data = os.read(stdout.fileno(), 65536)
            if not data:
                raise GuestError(f"the guest ended while {awaited!r} was awaited; {self._last_words()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        text = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        return f"its stderr: {text or 'empty'}"

    def send(self, command: str) -> None:
        """Gives a command without waiting for an answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def run(self, port_writes: int) -> list[dict[str, Any]]:
        """Makes every vCPU write a port exactly so many times; returns when all are idle again."""
        self.send(f"run {port_writes}")
        return [self.wait_for("done") for _ in self.vcpus]

    def notify(self, vcpu: int, **keys: int) -> None:
        """Starts a ``notify`` program on one vCPU; `wait_for("done")` tells when a bounded one has ended."""
        self.send(f"notify vcpu={vcpu} " + " ".join(f"{key}={value}" for key, value in keys.items()))

    def stop(self) -> None:
        """Makes every vCPU leave the guest; each that ran has answered ``done`` by then."""
        self.send("stop")
        self.wait_for("stopped")

    def reset(self) -> None:
        """Stops what runs and forgets answers that nobody waited for."""
        self.stop()
        self._set_aside.clear()


@contextmanager
def open_guest_process(
    *,
    vcpus: int = 1,
    name: str = "",
    uuid: str = "",
    style: str = "qemu",
    stats_fds: bool = False,
    vm_stats_fd: bool = False,
    vcpu_ids: Sequence[int] = (),
    port_writes: int | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[GuestProcess]:
    """Starts a guest, waits until its vCPUs exist (and made their port writes), ends it on the way out.

    ``prefix`` is a command that runs it.
    """
    wanted = tiny_guest.parse_arguments([])
    wanted.vcpus, wanted.name, wanted.uuid, wanted.style = vcpus, name, uuid, style
    wanted.stats_fds, wanted.vcpu_ids, wanted.port_writes = stats_fds, list(vcpu_ids), port_writes
    wanted.vm_stats_fd = vm_stats_fd
    with tempfile.TemporaryFile() as stderr, ExitStack() as stack:
        command = tiny_guest.build_command(wanted)
        if prefix:  # which cannot say itself what the guest is to be called
            rename = ("bash", "-c", 'exec -a "$0" "$@"')
            command = [*prefix, *rename, command[0], str(tiny_guest.PYTHON), *command[1:]]
        process = subprocess.Popen(
            command,
            executable=None if prefix else tiny_guest.PYTHON,
            env=tiny_guest.build_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        yield GuestProcess(process, stderr)
