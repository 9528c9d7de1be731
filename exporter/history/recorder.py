"""Keeps the last look at a host, whoever took it, and what its counters did: looks pass through here."""

from __future__ import annotations

import threading

from exporter.history.rates import History
from kvm.model import Snapshot, SnapshotReader


class Lately:
    """A SnapshotReader that remembers; as safe to share between threads as the reader it asks."""

    def __init__(self, reader: SnapshotReader) -> None:
        self.history = History()
        self._reader = reader
        self._snapshot: Snapshot | None = None
        self._lock = threading.Lock()

    @property
    def snapshot(self) -> Snapshot | None:
        """The last look, None before the first."""
        return self._snapshot

    def read(self) -> Snapshot:
        """Take one look."""
        snapshot = self._reader.read()
        self.history.observe(snapshot)
        with self._lock:
            if self._snapshot is None or self._snapshot.monotonic_seconds <= snapshot.monotonic_seconds:
                self._snapshot = snapshot
        return snapshot

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()
