"""The tracer on a guest that floods for as long as it takes, which emulated CPUs bear that take turns."""

from __future__ import annotations

import pytest

from kvm.perf.notify_tracer import SESSION_RECORDS
from tests.lab.inside.none.test_notify_trace import open_armed, open_tracer, wait_for_record
from tests.live import GuestProcess

pytestmark = pytest.mark.usefixtures("injector")


def test_refreshing_gives_a_full_allowance_each_time(guest: GuestProcess) -> None:
    """A used-up event is switched off a moment late, and by newer kernels for good: what follows must not suffer."""
    with open_tracer() as tracer, open_armed(tracer, guest.vcpus[0].tid) as armed:
        guest.notify(0, exits=0)
        for _ in range(200):
            seen = 0
            while True:
                records = wait_for_record(armed)
                seen += len(records.exits)
                assert (records.lost, records.odd) == (0, 0)
                if records.ended:
                    break
            assert seen == SESSION_RECORDS
            armed.refresh()
        guest.stop()
        guest.wait_for("done")
