"""Programs that hold something from their line ``ready`` to the end of their input, and the children that do it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def open_held(
    words: Sequence[str], executable: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a program while it holds what it has made; gives its pid."""
    with subprocess.Popen(
        words, executable=executable, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{words} did not make what it should hold")
            yield process.pid
        finally:
            process.communicate()


def hold() -> None:
    """Say that all is there, and wait for the end of the input."""
    print("ready", flush=True)
    sys.stdin.read()


@contextmanager
def open_children() -> Iterator[list[int]]:
    """Give a list for the pids of children, and end these."""
    children: list[int] = []
    try:
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
