"""``top`` in a real terminal, on simulated snapshots: whatever ends it, the terminal is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.commands.top import make_encodable
from exporter.top.cells import measure_width
from tests.tmux import Terminal, needs_tmux, open_terminal

ROOT = Path(__file__).parent.parent.parent.parent
COMMAND = f"cd {ROOT}; {sys.executable} -m tests.exporter.commands.terminal_program"


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with open_terminal() as terminal:
        yield terminal


def show(terminal: Terminal, trouble: str = "none") -> str:
    """Start the table and wait until it shows a rate; return how the terminal was before."""
    before = terminal.read_mode()
    terminal.start(f"{COMMAND} {trouble}")
    terminal.wait_for(lambda shown: any(line.split()[:4] == [">", "db", "2", "10"] for line in shown), "the table")
    assert terminal.read_mode() != before, "a terminal that is taken over can be told from one that is not"
    return before


def check_restored(terminal: Terminal, before: str, code: int) -> list[str]:
    ended, lines = terminal.wait_for_end()
    assert ended == code
    assert terminal.read_mode() == before
    assert not any("VMs by" in line for line in lines), "the table has gone"
    return lines


@needs_tmux
def test_q_gives_the_terminal_back(terminal: Terminal) -> None:
    before = show(terminal)
    terminal.press("q")
    check_restored(terminal, before, 0)


@needs_tmux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back(terminal: Terminal, number: signal.Signals) -> None:
    before = show(terminal)
    os.kill(terminal.find_child(), number)
    check_restored(terminal, before, 0)


@needs_tmux
def test_ctrl_c_gives_the_terminal_back(terminal: Terminal) -> None:
    before = show(terminal)
    terminal.press("C-c")
    check_restored(terminal, before, 0)


@needs_tmux
def test_it_can_be_suspended_and_goes_on(terminal: Terminal) -> None:
    show(terminal)
    terminal.press("C-z")
    terminal.wait_for(lambda shown: any("Stopped" in line for line in shown), "the shell has it stopped")
    terminal.type("fg")
    terminal.press("Enter")
    terminal.wait_for(lambda shown: any(line.startswith("> db") for line in shown), "the table is back")


@needs_tmux
def test_an_exception_gives_the_terminal_back_and_is_told(terminal: Terminal) -> None:
    before = terminal.read_mode()
    terminal.start(f"{COMMAND} fails")
    lines = check_restored(terminal, before, 1)
    assert "RuntimeError: the reader is broken" in lines


@needs_tmux
def test_keys_are_answered_while_a_reading_hangs(terminal: Terminal) -> None:
    before = show(terminal, "hangs")
    terminal.wait_for(lambda shown: any("no news: reading the host" in line for line in shown), "it tells")
    terminal.press("e")
    terminal.wait_for(lambda shown: shown[1] == "VMs by vcpu/exits per second", "it sorts")
    terminal.press("q")
    lines = check_restored(terminal, before, 0)
    assert any("left while reading the host hangs" in line for line in lines)


@needs_tmux
def test_the_log_spoils_no_screen_and_is_written_at_the_end(terminal: Terminal) -> None:
    before = show(terminal, "warns")
    shown = terminal.wait_for(lambda shown: 'msg="a strange thing"' in shown, "it is shown in a line of its own")
    assert shown[0].startswith("3 VMs")
    terminal.press("q")
    lines = check_restored(terminal, before, 0)
    assert any(line.endswith('level=WARN msg="a strange thing"') for line in lines)


@needs_tmux
def test_no_name_drives_the_terminal(terminal: Terminal) -> None:
    show(terminal)
    (line,) = [line for line in terminal.read_lines() if "日本" in line]
    assert line.split()[0] == "日本\\u001b[31m\\u202e"


@needs_tmux
@pytest.mark.parametrize("kind", ["vt100", "xterm-mono", "linux"])
def test_it_shows_without_colours_and_on_old_terminals(kind: str) -> None:
    with open_terminal(environment={"TERM": kind, "NO_COLOR": "1"}) as terminal:
        show(terminal)
        terminal.press("Down")
        terminal.wait_for(lambda shown: any(line.startswith("> web") for line in shown), "the mark moves")


@needs_tmux
def test_a_terminal_without_unicode_gets_question_marks() -> None:
    with open_terminal(environment={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}) as terminal:
        show(terminal)
        (line,) = [line for line in terminal.read_lines() if "????" in line]
        assert line.split()[0] == "????\\u001b[31m\\u202e"


@needs_tmux
@pytest.mark.parametrize(("kind", "told"), [("nothing-like-this", "is not known"), ("dumb", "cannot show")])
def test_a_terminal_that_cannot_show_it_is_told(kind: str, told: str) -> None:
    with open_terminal(width=200, environment={"TERM": kind}) as terminal:
        terminal.start(f"cd {ROOT}; {sys.executable} -m exporter top")
        code, lines = terminal.wait_for_end()
        assert code == 1
        assert any(told in line for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "koi8-r"])
def test_what_an_encoding_lacks_is_replaced_by_something_as_wide(encoding: str) -> None:
    text = "Käse 日本 база…"
    shown = make_encodable(text, encoding)
    assert shown.encode(encoding)
    assert measure_width(shown) == measure_width(text)
    assert (shown == text) is (encoding == "utf-8")


def test_stdout_that_is_no_terminal_gets_the_table_once() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "exporter", "top", "--interval=0.1", "--collector.source=debugfs"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1)
    assert "VMs by vcpu/notify_window_exits per second" in run.stdout.splitlines()
    assert "\x1b" not in run.stdout
