"""Runs a program in a terminal of tmux, presses keys there and reads what it shows."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.waiting import wait_until

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="Debian's package tmux is not installed")
# What the shell of the terminal says when it waits for a command.
PROMPT = "ready$"
# And what it says, before an exit code, when one has ended.
ENDED = "ended with "


class Terminal:
    """A terminal with a shell; made by `open_terminal`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    def _run(self, *words: str) -> str:
        return subprocess.run([*self._command, *words], check=True, capture_output=True, text=True).stdout

    def press(self, *keys: str) -> None:
        """Press keys by their names, as tmux has them: Enter, Escape, Up, C-c."""
        self._run("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text letter for letter."""
        self._run("send-keys", "-l", "--", text)

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def read_lines(self) -> list[str]:
        """Return what is shown, without spaces at the ends of lines."""
        return [line.rstrip() for line in self._run("capture-pane", "-p").splitlines()]

    def wait_for(self, holds: Callable[[list[str]], object], what: str, seconds: float = 60) -> list[str]:
        """Wait until what is shown is as it should be; return it."""
        shown: list[str] = []

        def look() -> object:
            shown[:] = self.read_lines()
            return holds(shown)

        wait_until(look, lambda: f"{what}: {shown}", seconds, pause_seconds=0.05)
        return shown

    def start(self, command: str) -> None:
        """Start a command in the shell, on an empty screen."""
        self.type(f"clear; {command}; echo {ENDED}$?")
        self.press("Enter")

    def wait_for_end(self) -> tuple[int, list[str]]:
        """Wait until the command has ended; return its exit code and what is shown."""
        lines = self.wait_for(lambda shown: any(line.startswith(ENDED) for line in shown), "the end")
        (ended,) = [line for line in lines if line.startswith(ENDED)]
        return int(ended.removeprefix(ENDED)), lines

    def read_mode(self) -> str:
        """Return what the terminal is set to: its line discipline, and whether its cursor and first screen show."""
        tty = self._run("display-message", "-p", "#{pane_tty}").strip()
        flags = self._run("display-message", "-p", "#{cursor_flag} #{alternate_on} #{keypad_flag}").strip()
        with Path(tty).open("rb") as terminal:
            return (
                subprocess.run(["stty", "-a"], stdin=terminal, check=True, capture_output=True, text=True).stdout
                + flags
            )

    def find_child(self) -> int:
        """Return the process that the shell runs."""
        shell = self._run("display-message", "-p", "#{pane_pid}").strip()
        children = Path(f"/proc/{shell}/task/{shell}/children")
        wait_until(lambda: children.read_text().split(), "the command runs")
        return int(children.read_text().split()[0])


@contextlib.contextmanager
def open_terminal(
    width: int = 80, height: int = 24, environment: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Start a tmux of its own, with nobody's configuration, and a shell in it."""
    with tempfile.TemporaryDirectory() as directory:
        tmux = ["tmux", "-S", f"{directory}/socket", "-f", "/dev/null", "-u"]
        shell = ["env", *(f"{name}={value}" for name, value in (environment or {}).items()), "bash", "--norc"]
        size = ["-x", str(width), "-y", str(height)]
        outer = {name: value for name, value in os.environ.items() if name not in ("TMUX", "LINES", "COLUMNS")}
        subprocess.run(
            [*tmux, "new-session", "-d", *size, *shell],
            check=True,
            env={**outer, "PS1": f"{PROMPT} ", "LANG": "C.UTF-8", "TERM": "xterm"},
        )
        terminal = Terminal(tmux)
        try:
            terminal.wait_for(lambda shown: any(line.endswith(PROMPT) for line in shown), "the shell is ready")
            yield terminal
        finally:
            subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)
