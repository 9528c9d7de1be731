"""CPU time of threads of this process: what runs has used it, what sleeps has not, what is gone has none."""

from __future__ import annotations

import os
import threading
import time

from exporter.monitor.cpu_time import read_cpu_time
from tests.waiting import wait_until

BUSY_SECONDS = 0.3


def test_a_busy_thread_and_an_idle_one_are_told_apart() -> None:
    end, tids = threading.Event(), {}

    def idle() -> None:
        tids["idle"] = threading.get_native_id()
        end.wait()

    def busy() -> None:
        tids["busy"] = threading.get_native_id()
        while time.thread_time() < BUSY_SECONDS:
            pass
        end.wait()

    threads = [threading.Thread(target=target) for target in (idle, busy)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: (read_cpu_time(os.getpid(), tids.get("busy", -1)) or 0.0) >= 0.8 * BUSY_SECONDS)
        idle_seconds = read_cpu_time(os.getpid(), tids["idle"])
        assert idle_seconds is not None
        assert idle_seconds < 0.1
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_a_thread_that_is_not_there_has_none() -> None:
    assert read_cpu_time(os.getpid(), 2**22 + 1) is None
    assert read_cpu_time(2**22 + 1, 2**22 + 1) is None
