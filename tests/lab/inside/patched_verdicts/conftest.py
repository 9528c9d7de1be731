"""What the tests of the agent on a patched KVM have in common: who counts its perf events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TRACING = Path("/sys/kernel/tracing")


@pytest.fixture(scope="module")
def perf_opens() -> Iterator[Callable[[], int]]:
    """Have the kernel record each call of perf_event_open, in a trace of our own; yields what counts them."""
    instance = TRACING / "instances/perf_opens"
    instance.mkdir()
    enabled = instance / "events/syscalls/sys_enter_perf_event_open/enable"
    try:
        enabled.write_text("1")
        yield lambda: (instance / "trace").read_text().count("sys_perf_event_open(")
    finally:
        enabled.write_text("0")
        instance.rmdir()
