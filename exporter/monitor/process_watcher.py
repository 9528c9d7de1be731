"""Holds a pidfd of each VM with tracked vCPUs: its end is known at once, and nothing of ours outlives it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Final

from exporter.monitor.backends import Run
from kvm.errors import MalformedData, VmGone
from kvm.model import VmKey

log = logging.getLogger(__name__)

_OPENING: Final = -1


class ProcessWatcher:
    """The pidfds; ``on_end`` is called, in the event loop, for each VM that ends."""

    def __init__(self, open_pidfd: Callable[[VmKey], int] | None, run: Run, on_end: Callable[[VmKey], None]) -> None:
        self._open_pidfd = open_pidfd
        self._run = run
        self._on_end = on_end
        self._pidfds: dict[VmKey, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, key: VmKey) -> None:
        """Watch a VM's process, unless that is done already."""
        if self._open_pidfd is None or key in self._pidfds:
            return
        self._pidfds[key] = _OPENING
        task = asyncio.get_running_loop().create_task(self._watch(key, self._open_pidfd))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def release(self, key: VmKey) -> None:
        """Watch a VM's process no more."""
        pidfd = self._pidfds.pop(key, _OPENING)
        if pidfd != _OPENING:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    async def close(self) -> None:
        """Watch no process any more."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for key in list(self._pidfds):
            self.release(key)

    async def _watch(self, key: VmKey, open_pidfd: Callable[[VmKey], int]) -> None:
        try:
            pidfd = await self._run(lambda: open_pidfd(key))
        except VmGone as err:
            log.debug("a VM has ended", extra={"fields": {"pid": key.pid, "err": str(err)}})
            self._on_end(key)
            return
        except (OSError, MalformedData) as err:
            # Its end is then noticed when snapshots miss it.
            log.warning("a VM's end cannot be waited for", extra={"fields": {"pid": key.pid, "err": str(err)}})
            return
        if self._pidfds.get(key) != _OPENING:  # released meanwhile, and perhaps watched again
            os.close(pidfd)
            return
        self._pidfds[key] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, key)
