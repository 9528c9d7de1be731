"""Writes log records as logfmt or JSON, one line each, in the spelling of Prometheus's own programs.

Untrusted text (VM names, command lines) reaches the log only as a quoted value: no name can forge a line or a field.
Structured fields come with ``extra={"fields": {...}}``.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_LEVEL_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
_BARE_VALUE = re.compile(r"[\w.:/@%+,-]+", re.ASCII)


def build_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of a line, in order."""
    fields: dict[str, object] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": _LEVEL_NAMES.get(record.levelno, record.levelname),
        "msg": record.getMessage(),
    }
    extra = getattr(record, "fields", None)
    if isinstance(extra, Mapping):
        fields |= {str(key): value for key, value in extra.items()}
    if record.exc_info and record.exc_info[1] is not None:
        fields["err"] = repr(record.exc_info[1])
        if record.levelno <= logging.DEBUG:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


def render_logfmt(fields: Mapping[str, object]) -> str:
    """Render ``key=value`` pairs, values quoted where they are not plain words."""
    return " ".join(f"{key}={_quote(str(value))}" for key, value in fields.items())


def _quote(value: str) -> str:
    # JSON's quoting escapes quotes, backslashes and everything outside ASCII, control characters among them.
    return value if _BARE_VALUE.fullmatch(value) else json.dumps(value)


class LogfmtFormatter(logging.Formatter):
    """One line of logfmt a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Render the record."""
        return render_logfmt(build_fields(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Render the record."""
        return json.dumps(build_fields(record), default=str)


def start_logging(level: str, style: str, stream: TextIO = sys.stderr) -> None:
    """Send the program's log to ``stream``; ``level`` is a key of LEVELS, ``style`` logfmt or json."""
    output = logging.StreamHandler(stream)
    output.setFormatter(JsonFormatter() if style == "json" else LogfmtFormatter())
    root = logging.getLogger()
    root.handlers[:] = [output]
    root.setLevel(LEVELS[level])
