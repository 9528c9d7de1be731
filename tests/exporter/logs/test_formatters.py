"""The log's lines: one a record, whatever strangers put into names."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.logs.formatters import JsonFormatter, LogfmtFormatter, render_logfmt, start_logging


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield root
    root.setLevel(level)
    root.handlers[:] = handlers


def make_record(**fields: object) -> logging.LogRecord:
    record = logging.LogRecord("x", logging.WARNING, "file.py", 1, "VM %s", ("left out",), None)
    record.fields = fields
    return record


def test_logfmt_is_spelled_as_prometheus_does() -> None:
    line = LogfmtFormatter().format(make_record(pid=7, why='a "quoted" name', empty=""))
    assert line.partition(" ")[2] == ('level=WARN msg="VM left out" pid=7 why="a \\"quoted\\" name" empty=""')
    assert line.startswith("time=2")


def test_json_keeps_types() -> None:
    document = json.loads(JsonFormatter().format(make_record(pid=7, why="x")))
    assert (document["level"], document["msg"], document["pid"], document["why"]) == ("WARN", "VM left out", 7, "x")


@given(st.dictionaries(st.sampled_from(["vm", "name", "why"]), st.text(), min_size=1))
def test_no_value_can_forge_a_line_or_a_field(fields: dict[str, str]) -> None:
    line = render_logfmt(fields)
    assert line.isascii()
    assert line.isprintable()
    outside_quotes = "".join(line.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    assert outside_quotes.count("=") == len(fields)


def test_errors_carry_no_traceback_unless_debugging(root_logger: logging.Logger) -> None:
    stream = io.StringIO()
    start_logging("debug", "logfmt", stream)
    for level in (logging.ERROR, logging.DEBUG):
        try:
            raise ValueError("boom")
        except ValueError:
            root_logger.log(level, "failed", exc_info=True)
    error, debug = stream.getvalue().splitlines()
    assert "boom" in error
    assert "Traceback" not in error
    assert "Traceback" in debug
    stream.truncate(0)
    start_logging("warn", "json", stream)
    logging.getLogger("any").info("quiet")
    assert stream.getvalue().strip("\0") == ""
