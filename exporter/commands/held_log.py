"""Keeps the log off a terminal that shows a table: the newest line is shown there, and all are written at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Final, TextIO

from exporter.logs.formatters import build_fields, render_logfmt

MAX_HELD: Final = 20
SHOWN_SECONDS: Final = 10.0


class HeldLog(logging.Handler):
    """Holds the last ``MAX_HELD`` records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=MAX_HELD)
        self.left_out = 0
        self._newest, self.newest_at = "", float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        """Hold the record."""
        self.left_out += len(self.records) == MAX_HELD
        self.records.append(record)
        fields = build_fields(record)
        told = {name: value for name, value in fields.items() if name not in ("time", "level")}
        self._newest, self.newest_at = render_logfmt(told), time.monotonic()

    def find_newest(self, now: float) -> str:
        """Return the newest line if it is new."""
        return self._newest if now - self.newest_at < SHOWN_SECONDS else ""


@contextlib.contextmanager
def hold_log(stream: TextIO) -> Iterator[HeldLog]:
    """Hold what goes to ``stream``, if that is a terminal, until the end."""
    held, root = HeldLog(), logging.getLogger()
    if not stream.isatty():
        yield held
        return
    handlers = list(root.handlers)
    root.handlers[:] = [held]
    try:
        yield held
    finally:
        root.handlers[:] = handlers
        if held.left_out:
            logging.getLogger(__name__).warning("older lines are left out", extra={"fields": {"lines": held.left_out}})
        for record in held.records:
            root.handle(record)
