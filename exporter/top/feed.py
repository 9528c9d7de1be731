"""Reads snapshots in a thread of its own, so that keys are answered while a reading of the host hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from exporter.top.comparison import Comparison
from kvm.model import Snapshot, SnapshotReader

# So long a reading that is under way is waited for at the end.
STOP_SECONDS: Final = 1.0


def read_twice(reader: SnapshotReader, seconds: float, sleep: Callable[[float], None] = time.sleep) -> Comparison:
    """Take two snapshots, ``seconds`` apart."""
    before = reader.read()
    sleep(seconds)
    return Comparison(reader.read(), before)


class SnapshotFeed:
    """Takes a snapshot every ``seconds`` and compares it with the one before; ``on_news`` is called in its thread."""

    def __init__(self, reader: SnapshotReader, seconds: float, on_news: Callable[[], None] = lambda: None) -> None:
        self._reader, self._seconds, self._on_news = reader, seconds, on_news
        self._stop = threading.Event()
        self._began_at: float | None = None
        self._comparison: Comparison | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="top-reader", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> bool:
        """Read no more; tells whether a reading that was under way has come to its end."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()

    def find_newest(self) -> Comparison | None:
        """Return the newest comparison, None before the first one; raises what the reader raised."""
        if self._failure is not None:
            raise self._failure
        return self._comparison

    def measure_reading(self) -> float:
        """Return for how many seconds the reading that is under way has gone on, 0 if there is none."""
        began_at = self._began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def _run(self) -> None:
        before: Snapshot | None = None
        while not self._stop.is_set():
            began_at = self._began_at = time.monotonic()
            try:
                snapshot = self._reader.read()
                self._comparison = Comparison(snapshot, before)
            except Exception as err:  # noqa: BLE001 - whoever asks for the newest one meets it
                self._failure = err
                self._stop.set()
            else:
                before = snapshot
            self._began_at = None
            self._on_news()
            self._stop.wait(max(0.0, self._seconds - (time.monotonic() - began_at)))
