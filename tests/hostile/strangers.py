"""Makes processes that do nothing, as fast as it can, and holds them until the end of its input: ``COUNT``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def main(count: int) -> None:
    """Make them, say ``ready``, and end them at the end of the input."""
    children = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


@contextmanager
def open_strangers(count: int) -> Iterator[None]:
    """Hold so many processes, new ones."""
    words = [sys.executable, "-m", "tests.hostile.strangers", str(count)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the strangers could not be made")
            yield
        finally:
            process.communicate()


if __name__ == "__main__":
    main(int(sys.argv[1]))
