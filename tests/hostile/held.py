"""Programs that hold something from their line ``ready`` to the end of their input, and the children that do it.

One that attacks all the while says at its end what came of it: a line of JSON, numbers by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class AttackFailed(Exception):
    """A program that was to hold something or to attack has ended by itself, or said nothing."""


def start(words: Sequence[str], executable: str | None, env: Mapping[str, str] | None) -> subprocess.Popen[str]:
    """Start a program whose input and output are ours."""
    return subprocess.Popen(
        words, executable=executable, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Wait for the line that says so; raises AttackFailed."""
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AttackFailed(f"{process.args!r} did not begin")


@contextmanager
def open_held(
    words: Sequence[str], executable: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a program while it holds what it has made; gives its pid."""
    with start(words, executable, env) as process:
        try:
            wait_until_ready(process)
            yield process.pid
        finally:
            process.communicate()


class Attack:
    """A program that attacks; made by `open_attack`."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> dict[str, int]:
        """End it; returns what came of it. Raises AttackFailed."""
        ended_before = self._process.poll() is not None
        output, _none = self._process.communicate(timeout=60)
        if ended_before or self._process.returncode:
            raise AttackFailed(f"{self.name} has ended with {self._process.returncode}")
        counts: dict[str, int] = json.loads(output.splitlines()[-1])
        return counts


@contextmanager
def open_attack(
    name: str, words: Sequence[str], executable: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Attack]:
    """Run a program that attacks from now on, until it is stopped."""
    with start(words, executable, env) as process:
        try:
            wait_until_ready(process)
            yield Attack(name, process)
        finally:
            if process.poll() is None:
                process.kill()


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
