"""What many ask for at once is rendered once, and never for one who came too late."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.web.renderings import Renderings


class Renderer:
    """Renders a number, the next one each time, when it is let."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.rendered: list[str] = []

    def render(self, key: str) -> bytes:
        self.begun.release()
        self.gate.acquire()
        self.rendered.append(key)
        if key == "bad":
            raise ValueError(key)
        return f"{key} {len(self.rendered)}".encode()


async def wait_begun(renderer: Renderer) -> None:
    await asyncio.to_thread(renderer.begun.acquire)


def test_a_thousand_who_ask_at_once_get_two_renderings() -> None:
    renderer = Renderer()

    async def scenario() -> None:
        renderings = Renderings(renderer.render, worker)
        first = asyncio.create_task(renderings.render("a"))
        await wait_begun(renderer)
        others = [asyncio.create_task(renderings.render(key)) for key in "a" * 1000 + "b"]
        await asyncio.sleep(0)
        for task in others[:500]:
            task.cancel()  # who leaves takes nothing away from the others
        renderer.gate.release(3)
        # What was begun before they asked would be older than their question.
        assert await first == b"a 1"
        assert set(await asyncio.gather(*others[500:])) == {b"a 2", b"b 3"}

    with ThreadPoolExecutor(max_workers=1) as worker:
        asyncio.run(scenario())
    assert renderer.rendered == ["a", "a", "b"]


def test_a_failure_is_for_all_who_asked_and_for_nobody_after() -> None:
    renderer = Renderer()

    async def scenario() -> None:
        renderings = Renderings(renderer.render, worker)
        first = asyncio.create_task(renderings.render("good"))
        await wait_begun(renderer)
        asked = [asyncio.create_task(renderings.render("bad")) for _ in range(3)]
        await asyncio.sleep(0)
        asked.pop().cancel()
        renderer.gate.release(3)
        assert await first == b"good 1"
        for task in asked:
            with pytest.raises(ValueError, match="bad"):
                await task
        assert await renderings.render("good") == b"good 3"

    with ThreadPoolExecutor(max_workers=1) as worker:
        asyncio.run(scenario())
