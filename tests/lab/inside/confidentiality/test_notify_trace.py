"""lockdown=confidentiality, raised after tracefs had made its files, leaves tracing of chosen threads alone."""

from __future__ import annotations

import pytest

from kvm.perf.notify_records import TraceRecords
from kvm.perf.notify_tracer import NotifyTracer
from tests.lab.inside.confidentiality.test_confidentiality import locked_down
from tests.live import GuestProcess

__all__ = ["locked_down"]
pytestmark = pytest.mark.usefixtures("locked_down")


def test_threads_are_armed(guest: GuestProcess) -> None:
    """No injector is here to make notify exits, so another RIP has to do."""
    tracer = NotifyTracer()
    tracer.open()
    armed = tracer.arm(guest.vcpus[0].tid)
    armed.watch_other_rips(1)
    guest.run(23)
    assert armed.read() == TraceRecords(other_rip=True)
    armed.disarm()
    tracer.close()
