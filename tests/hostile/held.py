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


class AttackFailed(Exception):
    """A program that was to attack has ended by itself, or said nothing."""


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
    with subprocess.Popen(
        words, executable=executable, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise AttackFailed(f"{name} did not begin")
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
