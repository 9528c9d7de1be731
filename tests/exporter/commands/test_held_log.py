"""The log while a table is shown."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from exporter.commands.held_log import MAX_HELD, SHOWN_SECONDS, hold_log
from exporter.logs.formatters import start_logging


class TerminalStream(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_are_held_shown_for_a_moment_and_written_at_the_end(root: logging.Logger) -> None:
    stream = TerminalStream()
    start_logging("warn", "logfmt", stream)
    with hold_log(stream) as held:
        assert held.find_newest(0) == ""
        root.warning("strange", extra={"fields": {"name": "a\x1bb"}})
        root.info("nothing to tell")
        assert stream.getvalue() == ""
        now = held.newest_at
        assert held.find_newest(now) == r'msg=strange name="a\u001bb"'
        assert held.find_newest(now + SHOWN_SECONDS) == ""
    assert stream.getvalue().endswith('level=WARN msg=strange name="a\\u001bb"\n')
    root.warning("later")
    assert "msg=later" in stream.getvalue()


def test_of_many_lines_the_last_are_kept_and_the_others_counted(root: logging.Logger) -> None:
    stream = TerminalStream()
    start_logging("warn", "logfmt", stream)
    with hold_log(stream):
        for number in range(MAX_HELD + 5):
            root.warning("line %d", number)
    lines = stream.getvalue().splitlines()
    assert len(lines) == MAX_HELD + 1
    assert lines[0].endswith('msg="older lines are left out" lines=5')
    assert lines[1].endswith('msg="line 5"')


def test_a_log_that_goes_elsewhere_is_left_alone(root: logging.Logger) -> None:
    stream = io.StringIO()
    start_logging("warn", "logfmt", stream)
    with hold_log(stream):
        root.warning("strange")
        assert "msg=strange" in stream.getvalue()


def test_what_fails_in_between_costs_no_line(root: logging.Logger) -> None:
    stream = TerminalStream()
    start_logging("warn", "logfmt", stream)
    with pytest.raises(RuntimeError), hold_log(stream):
        root.warning("strange")
        raise RuntimeError
    assert stream.getvalue().count("msg=strange") == 1
