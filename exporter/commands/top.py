"""``top``: the table that ``exporter/top`` lays out, live in a terminal; or once where stdout is none.

curses of the standard library draws it: every terminal that terminfo knows, over SSH as well, sends and shows what it
needs, it adds no dependency, and importing it takes a millisecond. Nothing is told by colours.
"""

from __future__ import annotations

import argparse
import contextlib
import curses
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Final

from exporter.commands.held_log import HeldLog, hold_log
from exporter.flag_values import choose_paths, select_statistics
from exporter.host_summary import can_read
from exporter.top.cells import measure_width
from exporter.top.comparison import Comparison
from exporter.top.feed import SnapshotFeed, read_twice
from exporter.top.notes import Status
from exporter.top.screen import Line, Style, render_screen
from exporter.top.view import Shown, View, press
from exporter.wiring import SINGLE_SNAPSHOT_WAIT_SECONDS, open_host
from kvm.identity.vm_ids import OWNER_WAIT_SECONDS
from kvm.model import SnapshotReader
from kvm.statistics import StatScope

log = logging.getLogger(__name__)

# The screen is drawn anew at least so often: to tell that a reading hangs.
REDRAW_SECONDS: Final = 1.0
# The rest of an arrow key's bytes comes within this after an escape, over a slow line too.
ESCAPE_MS: Final = 100
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KEY_NAMES: Final = {
    "KEY_UP": "up",
    "KEY_DOWN": "down",
    "KEY_LEFT": "left",
    "KEY_RIGHT": "right",
    "KEY_PPAGE": "pageup",
    "KEY_NPAGE": "pagedown",
    "KEY_HOME": "home",
    "KEY_END": "end",
    "KEY_ENTER": "enter",
    "KEY_BACKSPACE": "backspace",
    "\n": "enter",
    "\r": "enter",
    "\x1b": "escape",
    "\x7f": "backspace",
    "\b": "backspace",
}
STYLES: Final = {Style.PLAIN: curses.A_NORMAL, Style.BOLD: curses.A_BOLD, Style.REVERSE: curses.A_REVERSE}


def run_top(arguments: argparse.Namespace) -> int:
    """Show the table until somebody leaves it; 0. Raises ValueError for a terminal that cannot show it.

    Where stdin or stdout is no terminal it is printed once, and the exit code is that of ``once``.
    """
    view = View(all_vcpus=arguments.all_vcpus)
    is_live = sys.stdin.isatty() and sys.stdout.isatty()
    if is_live:
        check_terminal()
    with contextlib.ExitStack() as stack:
        selection = select_statistics(arguments, StatScope.VCPU)
        wait = OWNER_WAIT_SECONDS if is_live else SINGLE_SNAPSHOT_WAIT_SECONDS
        reader = open_host(arguments.sources, stack, wait, paths=choose_paths(arguments), selection=selection).reader
        if not is_live:
            return print_once(view, reader, arguments.interval)
        run_live(view, reader, arguments.interval)
    return 0


def print_once(view: View, reader: SnapshotReader, seconds: float) -> int:
    """Print the table of all rows; 0 if counters could be read, else 1."""
    comparison = read_twice(reader, seconds)
    width = shutil.get_terminal_size().columns
    lines = render_screen(view, comparison, Status(socket.gethostname()), width, None).lines
    sys.stdout.write("".join(f"{line.text}\n" for line in lines))
    return 0 if can_read(comparison.now) else 1


def check_terminal() -> None:
    """Make sure that the terminal can do what is needed; raises ValueError."""
    kind = os.environ.get("TERM", "")
    try:
        curses.setupterm()
    except curses.error as err:
        raise ValueError(f"TERM={kind!r} is not known to this host: set another, such as xterm or vt100") from err
    if not curses.tigetstr("cup"):
        raise ValueError(f"a terminal of TERM={kind!r} cannot show a table that moves: pipe it through cat for one")


def run_live(view: View, reader: SnapshotReader, seconds: float) -> None:
    """Show the table until somebody leaves it; ends the process if a reading hangs then."""
    with contextlib.ExitStack() as stack:
        bell, ring = stack.enter_context(open_bell())
        feed = SnapshotFeed(reader, seconds, ring)
        feed.start()
        stack.push(partial(end_reading, feed))  # once the terminal is given back
        held = stack.enter_context(hold_log(sys.stderr))
        signals = stack.enter_context(watch_signals(ring))
        Terminal(stack.enter_context(open_terminal()), feed, held, bell).run(view, signals)


def end_reading(
    feed: SnapshotFeed, _kind: type[BaseException] | None, err: BaseException | None, _trace: TracebackType | None
) -> None:
    """Wait for the reading that is under way, or end the process where it hangs.

    To close what a thread still reads by could crash, and to wait for it could take for ever.
    """
    if not feed.stop():
        log.warning("left while reading the host hangs", exc_info=err)
        os._exit(1 if err else 0)


@contextlib.contextmanager
def open_bell() -> Iterator[tuple[int, Callable[[], None]]]:
    """Open what wakes the loop: an fd to poll, and what any thread or signal handler may call."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    is_open = True

    def ring() -> None:
        if is_open:  # a reading that hangs may come to its end after all of this
            with contextlib.suppress(BlockingIOError):  # it has been rung often enough
                os.write(writer, b"!")

    try:
        yield reader, ring
    finally:
        is_open = False
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def watch_signals(ring: Callable[[], None]) -> Iterator[list[int]]:
    """Collect the signals that end it, instead of ending at once; a new size of the terminal only rings."""
    seen: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number in STOP_SIGNALS:
            seen.append(number)
        ring()

    before = {number: signal.signal(number, note) for number in (*STOP_SIGNALS, signal.SIGWINCH)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def open_terminal() -> Iterator[curses.window]:
    """Take the terminal over, and give it back as it was, whatever happens."""
    if "ESCDELAY" not in os.environ:
        curses.set_escdelay(ESCAPE_MS)
    window = curses.initscr()
    try:
        curses.noecho()
        curses.cbreak()
        window.keypad(True)
        window.nodelay(True)
        with contextlib.suppress(curses.error):  # a terminal that cannot hide its cursor
            curses.curs_set(0)
        yield window
    finally:
        window.keypad(False)
        curses.echo()
        curses.nocbreak()
        curses.endwin()


class Terminal:
    """The loop: waits for keys and news, and draws."""

    def __init__(self, window: curses.window, feed: SnapshotFeed, held: HeldLog, bell: int) -> None:
        self._window, self._feed, self._held, self._bell = window, feed, held, bell
        self._frozen: Comparison | None = None
        self._host_name = socket.gethostname()

    def run(self, view: View, signals: Sequence[int]) -> None:
        """Show the table until a key or a signal ends it, or the terminal has gone; raises what the reader raised."""
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        shown, current = self._draw(view), view
        while not signals:
            ready = dict(poll.poll(REDRAW_SECONDS * 1000))
            if ready.get(sys.stdin.fileno(), 0) & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
            with contextlib.suppress(BlockingIOError):
                os.read(self._bell, 4096)
            for key in self._read_keys():
                pressed = press(current, key, shown)
                if pressed is None:
                    return
                if pressed is not current:  # the next key means what this one shows
                    current = pressed
                    shown = self._draw(current)
            shown = self._draw(current)

    def _read_keys(self) -> Iterator[str]:
        while True:
            try:
                key = self._window.get_wch()
            except curses.error:  # no more
                return
            name = key if isinstance(key, str) else curses.keyname(key).decode()
            if name == "\f":  # Ctrl-L, as everywhere
                self._window.clear()
            yield KEY_NAMES.get(name, name)

    def _draw(self, view: View) -> Shown:
        newest = self._feed.find_newest()
        self._frozen = (self._frozen or newest) if view.is_frozen else None
        self._resize()
        height, width = self._window.getmaxyx()
        status = Status(self._host_name, self._feed.measure_reading(), self._held.find_newest(time.monotonic()))
        screen = render_screen(view, self._frozen or newest, status, width, height)
        self._window.erase()
        for number, line in enumerate(screen.lines):
            self._write(number, line)
        self._window.refresh()
        return screen.shown

    def _resize(self) -> None:
        """Follow the terminal's size; one that does not tell it stays as terminfo says."""
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.lines > 0 and size.columns > 0 and (size.lines, size.columns) != self._window.getmaxyx():
            curses.resizeterm(size.lines, size.columns)
            self._window.clear()

    def _write(self, number: int, line: Line) -> None:
        text = make_encodable(line.text, self._window.encoding)
        with contextlib.suppress(curses.error):  # behind the last column of the last line there is no place
            self._window.addstr(number, 0, text, STYLES[line.style])


def make_encodable(text: str, encoding: str) -> str:
    """Return what a terminal of that encoding can show, equally wide: ``?`` for what it cannot."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_replace(letter, encoding) for letter in text)
    return text


def _replace(letter: str, encoding: str) -> str:
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        return "?" * measure_width(letter)
    return letter
