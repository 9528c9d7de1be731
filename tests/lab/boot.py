"""Boots a kernel under emulation, has it carry out a job, and brings back what came of it.

Decisions:

* QEMU 10 with TCG and ``-cpu max``: SVM with nested paging, so KVM for AMD loads and runs guests. QEMU 7.2
  was seen to crash a guest with two CPUs. Two CPUs, because code on another CPU is what races need.
* The report has a virtio-serial port of its own. The console is only for the kernel's words: what
  a panic or a hang leaves is there, and its last lines are part of every failure's message.
* Every wait ends: the boot, the job, and a silence on both channels each have a limit. They are far
  above what is usual, because a loaded machine makes emulation slow and a test must not fail for that.
* Emulating two CPUs is not perfect: when a kernel rewrites its own code, a CPU may stumble over the breakpoint
  that is there meanwhile. It was seen once in some eighty boots, on a machine with far too much to do, before
  ``/init``, when the kernel gave up its trust in the TSC. ``tsc=reliable`` takes that occasion away; and a panic
  before any program of ours has run says nothing about us: then the boot is repeated once, and a line tells.
  A guest that exits thousands of times a second finds it soon: with the tracepoint kvm_exit switched on and off
  meanwhile, two of three boots ended in svm_vcpu_run within a minute, one of them without the injector. With the
  tracepoint held on, four boots got through 64,000 times. So no test does that here but where CPUs take turns.
  One CPU, or two that take turns, would not stumble; but no race would ever show, and it takes twice as long.
* Two CPUs that take turns (``ThreadIndex.SINGLE``) are for guests that flood: with a thread for each, QEMU's SVM loses
  its way after some 100,000 exits a second, guests triple fault, and the kernel finds its stacks overwritten.
* ``oops=panic panic=-1`` and ``-no-reboot``: a kernel that is no longer sound ends the run at once.
"""

from __future__ import annotations

import base64
import json
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.lab.apt import LabError, say
from tests.lab.debian import Kernel, find_qemu10
from tests.lab.guest_job import PORT_NAME
from tests.lab.initramfs import write_initramfs

CONSOLE_LINES = 30
PANIC = re.compile(r"Kernel panic - not syncing: .*(?=\n)")
APPEND = "console=ttyS0 loglevel=5 oops=panic panic=-1 random.trust_cpu=on tsc=reliable"


class ThreadIndex(StrEnum):
    """How QEMU emulates two CPUs: each with a thread of its own, or both with one, in turns of 0.1 s."""

    MULTI = "multi"
    SINGLE = "single"


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds, before a run counts as lost."""

    boot_seconds: float = 120.0
    silence_seconds: float = 180.0
    job_seconds: float = 900.0


@dataclass
class Run:
    """What a booted kernel has reported so far."""

    release: str = ""
    lockdown: str = ""
    output: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_status: int | None = None
    console: str = ""
    boot_seconds: float = 0.0
    seconds: float = 0.0


class RunLost(LabError):
    """The kernel panicked, hung or went silent; the message ends with its last console lines."""

    def __init__(self, reason: str, run: Run, qemu_stderr: str = "") -> None:
        self.reason, self.run = reason, run
        lines = [line.rstrip() for line in run.console.splitlines() if line.strip()][-CONSOLE_LINES:]
        parts = [f"{run.release or 'the kernel'}: {reason}"]
        parts += ["last lines of the console:", *(f"  | {line}" for line in lines or ["(it said nothing)"])]
        parts += ["QEMU said:", f"  | {qemu_stderr.strip()[-1000:]}"] if qemu_stderr.strip() else []
        parts += ["end of the output:", run.output[-2000:]] if run.output else []
        super().__init__("\n".join(parts))


def build_command(
    kernel: Kernel,
    initramfs: Path,
    append: str,
    threads: ThreadIndex,
    fds: tuple[int, int],
    *,
    disk: Path | None = None,
) -> list[str]:
    """Returns the words that start QEMU with its console and report channel on two given sockets."""
    console_fd, report_fd = fds
    return [
        str(find_qemu10()),
        *("-accel", f"tcg,thread={threads}", "-cpu", "max", "-smp", "2", "-m", "2048"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", f"{APPEND} {append}".strip()),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=report,fd={report_fd}"),
        *("-device", f"virtserialport,chardev=report,name={PORT_NAME}"),
        *(("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe") if disk else ()),
    ]


class Listener:
    """Takes in what a run says on its two channels."""

    def __init__(self, console: socket.socket, report: socket.socket) -> None:
        self.run = Run()
        self._console, self._report = console, report
        self._started = self._heard = time.monotonic()
        self._unread = b""

    def listen(self, limits: Limits) -> None:
        """Returns when the run has reported an exit status; raises RunLost when it will not."""
        open_channels = [self._console, self._report]
        while self.run.exit_status is None:
            self._check_limits(limits)
            for channel in select.select(open_channels, [], [], 1.0)[0]:
                data = channel.recv(1 << 16)
                if not data:
                    open_channels.remove(channel)
                elif channel is self._console:
                    self._take_console(data)
                else:
                    self._take_report(data)
            panic = PANIC.search(self.run.console)
            if not open_channels or panic:
                raise RunLost(panic.group().rstrip() if panic else "ended before its job was done", self.run)
        self.run.seconds = time.monotonic() - self._started

    def _check_limits(self, limits: Limits) -> None:
        now = time.monotonic()
        if not self.run.release and now - self._started > limits.boot_seconds:
            raise RunLost(f"did not come up within {limits.boot_seconds:.0f} s", self.run)
        if now - self._heard > limits.silence_seconds:
            raise RunLost(f"said nothing for {limits.silence_seconds:.0f} s", self.run)
        if now - self._started > limits.boot_seconds + limits.job_seconds:
            raise RunLost(f"did not finish its job within {limits.job_seconds:.0f} s", self.run)

    def _take_console(self, data: bytes) -> None:
        self._heard = time.monotonic()
        self.run.console += data.decode(errors="replace")

    def _take_report(self, data: bytes) -> None:
        self._heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take_event(json.loads(line))

    def _take_event(self, event: Mapping[str, str | int]) -> None:
        run = self.run
        match event["event"]:
            case "hello":
                run.release, run.lockdown = str(event["release"]), str(event["lockdown"])
                run.boot_seconds = time.monotonic() - self._started
            case "output":
                run.output += str(event["text"])
            case "file":
                run.files[str(event["name"])] = base64.b64decode(str(event["base64"]))
            case "exit":
                run.exit_status = int(event["status"])


def run_in_kernel(
    kernel: Kernel,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    files: Sequence[str] = (),
    append: str = "",
    threads: ThreadIndex = ThreadIndex.MULTI,
    limits: Limits | None = None,
) -> Run:
    """Boots a kernel, runs a command in it from the project's directory, and returns what it reported.

    `files` are brought back where they exist. `append` goes to the kernel's command line. Raises RunLost.
    """
    job = {"command": list(command), "environment": dict(environment or {}), "files": list(files)}
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        initramfs = Path(scratch) / "initramfs.cpio"
        write_initramfs(kernel, job, initramfs)
        try:
            return boot(kernel, initramfs, append, threads, limits or Limits())
        except RunLost as err:
            if err.run.release or not PANIC.search(err.run.console):
                raise
            say(f"{kernel.release} panicked before /init, booting it once more: {err.reason}")
        return boot(kernel, initramfs, append, threads, limits or Limits())


def boot(
    kernel: Kernel,
    initramfs: Path,
    append: str,
    threads: ThreadIndex,
    limits: Limits,
    *,
    disk: Path | None = None,
) -> Run:
    """Boots a kernel with an initramfs, and a disk if any, and listens until its job is done; raises RunLost."""
    with ExitStack() as stack:
        console, console_end = (stack.enter_context(end) for end in socket.socketpair())
        report, report_end = (stack.enter_context(end) for end in socket.socketpair())
        ends = (console_end.fileno(), report_end.fileno())
        stderr = stack.enter_context(tempfile.TemporaryFile())
        qemu = build_command(kernel, initramfs, append, threads, ends, disk=disk)
        process = subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=ends)
        stack.callback(process.wait)
        stack.callback(process.kill)
        # Ours alone were the other ends: with these closed, QEMU's end is an end of file.
        console_end.close()
        report_end.close()
        listener = Listener(console, report)
        try:
            listener.listen(limits)
        except RunLost as err:
            stderr.seek(0)
            raise RunLost(err.reason, listener.run, stderr.read().decode(errors="replace")) from None
        return listener.run
