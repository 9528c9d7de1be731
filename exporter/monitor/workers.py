"""The threads in which the monitor waits for the kernel, so that the event loop never does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

WORKERS: Final = 4


class Workers:
    """A few threads of the monitor's own: a scrape that waits cannot delay a verdict."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="monitor")

    async def __call__(self, call: Callable[[], T]) -> T:
        """Run a call in a thread; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """End the threads, once what they do is done."""
        self._executor.shutdown(wait=True)
