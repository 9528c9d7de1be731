"""What the agent says that it uses: of this process, whose threads are known."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.monitor.agent_usage import name_kind, read_agent_usage
from exporter.stalls.verdicts import THREAD_KINDS


@pytest.mark.parametrize(
    ("thread", "kind"),
    [
        ("MainThread", "main"),
        ("monitor_3", "monitor"),
        ("scrape_0", "scrape"),
        ("status_0", "status"),
        ("status-snapshot_0", "status"),
        ("Thread-7 (run)", "other"),
        ("asyncio_0", "other"),
        ("", "other"),
    ],
)
def test_a_thread_is_of_the_kind_of_its_pool(thread: str, kind: str) -> None:
    assert name_kind(thread) == kind


def test_a_busy_pool_shows_in_its_kind_and_a_thread_more_in_the_number() -> None:
    def burn() -> None:
        while time.thread_time() < 0.3:
            pass

    before = read_agent_usage()
    with ThreadPoolExecutor(1, thread_name_prefix="scrape") as pool:
        pool.submit(burn).result()
        after = read_agent_usage()
        names = [thread.name for thread in threading.enumerate()]
    assert before is not None
    assert after is not None
    assert "scrape_0" in names
    assert set(after.cpu_seconds) == set(THREAD_KINDS)
    assert after.cpu_seconds["scrape"] - before.cpu_seconds["scrape"] >= 0.2
    assert after.cpu_seconds["monitor"] == before.cpu_seconds["monitor"]
    assert after.threads == before.threads + 1
    assert after.voluntary_switches > before.voluntary_switches
