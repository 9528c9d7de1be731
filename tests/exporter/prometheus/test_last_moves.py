"""When vCPUs were seen to move, of as few VMs as there may be; all else is in test_histories.py."""

from __future__ import annotations

from dataclasses import replace

from exporter.history.increases import IncreaseTracker
from exporter.prometheus.last_moves import LastMoves
from kvm.model import NOTIFY_WINDOW_EXITS
from tests.snapshots import make_reading, make_snapshot


def test_a_flood_of_vms_that_are_not_shown_has_no_lines() -> None:
    tracker, reading = IncreaseTracker(), make_reading(notify=(0, 0))
    for number in range(2):
        counters = reading.counters._replace(per_vcpu={NOTIFY_WINDOW_EXITS: (number, number)})
        tracker.observe(make_snapshot(replace(reading, counters=counters)))
    assert tracker.all_moved_at is not None
    assert LastMoves(tracker).render([], lambda _vms, _ask: []).chunks == []
