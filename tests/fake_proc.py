"""A proc of a test's own, made of captured files, in which reading a command line can be made to hang."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from tests.waiting import wait_until

FIXTURES = Path(__file__).parent / "fixtures" / "owners"
START_TICKS = 4711


def owner_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "owners"]


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
        self.set_start_ticks(pid, START_TICKS)
        return pid

    def set_start_ticks(self, pid: int, ticks: int) -> None:
        (self.path / str(pid) / "stat").write_text(f"{pid} (q) S {'0 ' * 18}{ticks} 0 0\n")

    def cmdline(self, pid: int) -> Path:
        return self.path / str(pid) / "task" / str(pid) / "cmdline"

    def add_status(self, pid: int, fixture: str, name: str, directory: str = "run/libvirt/qemu") -> Path:
        """Put a captured status XML into the process's own root."""
        file = self.path / str(pid) / "task" / str(pid) / "root" / directory / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIXTURES / fixture / "status.xml", file)
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
        """Answer whoever reads these command lines, until nobody does any more."""

        def answer_all() -> bool:
            for pid in pids:
                with (
                    contextlib.suppress(OSError),  # ENXIO: nobody reads this one now
                    os.fdopen(os.open(self.cmdline(pid), os.O_WRONLY | os.O_NONBLOCK), "wb") as pipe,
                ):
                    pipe.write(b"qemu-system-x86_64\0-name\0late\0")
            return not owner_threads()

        wait_until(answer_all)
