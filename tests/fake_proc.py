"""A proc of a test's own, made of captured files, in which reading a command line can be made to hang."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from tests.waiting import wait_until

FIXTURES = Path(__file__).parent / "fixtures" / "owners"
START_TICKS = 4711
LATE = b"qemu-system-x86_64\0-name\0late\0"
UID = 64055


class FakeProc:
    """A directory like /proc, filled from captured files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, fixture: str, pid: int | None = None) -> int:
        """Add a captured process, under another pid where one is given; returns its pid."""
        files = FIXTURES / fixture
        if pid is None:
            pid = int((files / "status").read_text().split()[1])
        thread = self.path / str(pid) / "task" / str(pid)
        thread.mkdir(parents=True)
        for name in ("comm", "status", "cgroup"):
            shutil.copy(files / name, self.path / str(pid) / name)
        shutil.copy(files / "cmdline", thread / "cmdline")
        (thread / "exe").symlink_to((files / "exe").read_text())
        (thread / "root").mkdir()
        (thread / "ns").mkdir()
        (thread / "ns" / "mnt").symlink_to("/proc/self/ns/mnt")
        self.set_uid(pid, UID)
        self.set_start_ticks(pid, START_TICKS)
        return pid

    def set_start_ticks(self, pid: int, ticks: int) -> None:
        (self.path / str(pid) / "stat").write_text(f"{pid} (q) S {'0 ' * 18}{ticks} 0 0\n")

    def set_uid(self, pid: int, uid: int) -> None:
        """Let the process belong to a user; captured files name none."""
        file = self.path / str(pid) / "status"
        kept = [line for line in file.read_text().splitlines() if not line.startswith("Uid:")]
        file.write_text("\n".join([*kept, "Uid:" + f"\t{uid}" * 4, ""]))

    def cmdline(self, pid: int) -> Path:
        return self.path / str(pid) / "task" / str(pid) / "cmdline"

    def add_status(self, pid: int, fixture: str, name: str, directory: str = "run/libvirt/qemu") -> Path:
        """Put a captured status XML into the process's own root."""
        file = self.path / str(pid) / "task" / str(pid) / "root" / directory / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIXTURES / fixture / "status.xml", file)
        file.chmod(0o600)  # as libvirt makes it
        return file

    def hang(self, pid: int) -> None:
        """Let nobody read the process's command line until ``release``."""
        self.cmdline(pid).unlink()
        os.mkfifo(self.cmdline(pid))

    def hold(self, pid: int) -> BinaryIO:
        """Return when somebody hangs in reading the command line; closing what is returned lets them go on."""
        writers = []

        def is_read() -> bool:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
                writers.append(os.fdopen(os.open(self.cmdline(pid), os.O_WRONLY | os.O_NONBLOCK), "wb"))
            return bool(writers)

        wait_until(is_read)
        return writers[0]

    def release(self, *pids: int) -> None:
        """Give these processes command lines that can be read, also to whoever hangs in reading one."""
        for pid in pids:
            file, pipe = self.cmdline(pid), self.cmdline(pid).with_name("hung")
            file.rename(pipe)
            file.write_bytes(LATE)
            with (
                contextlib.suppress(OSError),  # ENXIO: nobody hangs there
                os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb") as writer,
            ):
                writer.write(LATE)
