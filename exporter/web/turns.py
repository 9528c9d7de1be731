"""A few places that clients take in turns, so that one who asks ever more holds up itself and nobody else."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TooManyWaiting(Exception):
    """A client has as many requests waiting as it may."""


class Turns:
    """Lets ``places`` in at once; of those that wait, each client's first comes before anybody's second."""

    def __init__(self, places: int, waiting_per_client: int) -> None:
        self._free = places
        self._waiting_per_client = waiting_per_client
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def take(self, client: str) -> AsyncIterator[None]:
        """Hold a place inside the context, after waiting for it; raises TooManyWaiting."""
        await self._wait(client)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, client: str) -> None:
        if self._free:
            self._free -= 1
            return
        queue = self._queues.setdefault(client, deque())
        if len(queue) >= self._waiting_per_client:
            raise TooManyWaiting
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self._pass_on()
            else:
                self._forget(client, turn)
            raise

    def _pass_on(self) -> None:
        """Give a place that is free to the first request of the client that has waited longest."""
        while self._queues:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(client)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[client]
