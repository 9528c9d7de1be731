"""Takes every snapshot of a host, whoever asks for one, and keeps the last one and what its counters did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from exporter.history.rates import RateHistory
from kvm.model import Snapshot, SnapshotReader


class SnapshotRecorder:
    """A SnapshotReader that any thread may use: it lets its reader take one snapshot at a time, and remembers."""

    def __init__(self, reader: SnapshotReader, clock: Callable[[], float] = time.monotonic) -> None:
        self.history = RateHistory()
        self.reading_since: float | None = None
        """Since when, by ``clock``, a snapshot has been under way; None where none is."""
        self.has_failed = False
        """Whether the last reading of the host ended with an exception, so that ``snapshot`` is one before that."""
        self._reader, self._clock = reader, clock
        self._snapshot: Snapshot | None = None
        self._lock = threading.Lock()

    @property
    def snapshot(self) -> Snapshot | None:
        """The last snapshot, None before the first."""
        return self._snapshot

    def read(self) -> Snapshot:
        """Take a snapshot; waits while another thread does."""
        with self._lock:
            self.reading_since = self._clock()
            try:
                snapshot = self._reader.read()
                self.history.observe(snapshot)
            except Exception:
                self.has_failed = True
                raise
            finally:
                self.reading_since = None
            self._snapshot, self.has_failed = snapshot, False
        return snapshot

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()
