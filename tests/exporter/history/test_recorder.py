"""Snapshots are taken one at a time, and the last one is kept."""

from __future__ import annotations

import threading

from exporter.history.recorder import SnapshotRecorder
from kvm.model import Snapshot
from tests.snapshots import make_snapshot
from tests.waiting import wait_until


class Slow:
    def __init__(self) -> None:
        self.inside = self.most = 0
        self.gate = threading.Event()

    def read(self) -> Snapshot:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.gate.wait(10)
        self.inside -= 1
        return make_snapshot()

    def close(self) -> None:
        """Nothing to give back."""


def test_one_snapshot_is_taken_at_a_time() -> None:
    slow = Slow()
    shared = SnapshotRecorder(slow)
    threads = [threading.Thread(target=shared.read) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: slow.inside == 1)
    slow.gate.set()
    for thread in threads:
        thread.join()
    assert slow.most == 1
    shared.close()
