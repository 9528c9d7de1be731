"""Renders what many ask for at once only once: a flood of scrapes costs no more than two."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Rendered = TypeVar("Rendered")


class _Waiting(Generic[Rendered]):
    """A rendering that has not begun."""

    future: asyncio.Future[Rendered]


class Renderings(Generic[Key, Rendered]):
    """Renders in ``worker``; whoever asks while a rendering of the same waits for its turn gets that one.

    No answer is older than its question: one that is being rendered is not shared with who comes then.
    """

    def __init__(self, render: Callable[[Key], Rendered], worker: Executor) -> None:
        self._render, self._worker = render, worker
        self._waiting: dict[Key, _Waiting[Rendered]] = {}
        self._askers: Counter[asyncio.Future[Rendered]] = Counter()

    @property
    def count(self) -> int:
        """How many renderings somebody waits for."""
        return len(self._askers)

    async def render(self, key: Key) -> Rendered:
        """Return what ``render`` makes of the key; raises what it raises."""
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _Waiting[Rendered]()  # before the worker, which may begin at once
            waiting.future = asyncio.get_running_loop().run_in_executor(self._worker, self._begin, key)
            waiting.future.add_done_callback(_take_note)
        shared = waiting.future
        self._askers[shared] += 1
        try:
            return await asyncio.shield(shared)  # who leaves, leaves it to the others
        finally:
            self._askers[shared] -= 1
            if not self._askers[shared]:
                del self._askers[shared]

    def _begin(self, key: Key) -> Rendered:
        del self._waiting[key]
        return self._render(key)


def _take_note(rendered: asyncio.Future[Rendered]) -> None:
    """Have a failure count as seen, also when all have left who would have seen it."""
    if not rendered.cancelled():
        rendered.exception()
