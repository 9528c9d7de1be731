"""Places that clients take in turns."""

from __future__ import annotations

import asyncio

import pytest

from exporter.web.turns import TooManyWaiting, Turns


def test_clients_take_turns_whoever_asks_more() -> None:
    order: list[str] = []

    async def main() -> None:
        turns = Turns(1, 10)

        async def ask(client: str) -> None:
            async with turns.take(client.rstrip("0123456789")):
                order.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(client) for client in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")))

    asyncio.run(main())
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_places_are_bounded_and_given_back_whatever_happens() -> None:
    async def main() -> None:
        turns, inside, most = Turns(2, 100), 0, 0

        async def ask(number: int) -> None:
            nonlocal inside, most
            async with turns.take(str(number % 7)):
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    inside -= 1
                if number % 5 == 0:
                    raise ValueError("goes wrong inside")

        tasks = [asyncio.create_task(ask(number)) for number in range(60)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()
        assert most == 2
        async with turns.take("x"), turns.take("y"):  # both places are free again
            pass

    asyncio.run(asyncio.wait_for(main(), 30))


def test_one_client_has_a_bounded_queue() -> None:
    async def main() -> None:
        turns = Turns(1, 2)
        async with turns.take("a"):
            waiting = [asyncio.create_task(_take(turns, "a")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(TooManyWaiting):
                await _take(turns, "a")
            waiting.append(asyncio.create_task(_take(turns, "b")))
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)

    asyncio.run(asyncio.wait_for(main(), 30))


async def _take(turns: Turns, client: str) -> None:
    async with turns.take(client):
        pass
