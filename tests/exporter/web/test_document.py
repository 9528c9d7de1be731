"""Documents in memory: as long as they are being written, and no longer."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
from aiohttp import web

from exporter.web.listeners import Address
from kvm.simulated.host import SimulatedHost
from tests.exporter.web.test_server import Answer, Client, ask, run

CLIENTS = 100
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n"


def read_resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_idle_connections_hold_no_document() -> None:
    async def scenario(address: Address) -> None:
        large = len((await ask(address)).body)
        assert large > 1_000_000
        before = read_resident_mb()
        clients = []
        for _ in range(CLIENTS):
            client = await Client.open(address)
            await client.send(REQUEST)
            # Read, but not kept: it is the server's memory that is asked about.
            await client.reader.readuntil(b"\r\n\r\n")
            left = large - 1000  # the number of bytes differs by a little from scrape to scrape
            while left > 0:
                left -= len(await client.reader.read(min(left, 1 << 16)))
            clients.append(client)
        grown = read_resident_mb() - before
        assert grown < CLIENTS * large / 1e6 / 5
        for client in clients:
            await client.close()

    run(scenario, SimulatedHost(vm_count=625, vcpus_per_vm=16))


def test_a_document_is_whole_however_often_it_is_asked_for() -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        for _ in range(3):
            await client.send(REQUEST)
            answer: Answer = await client.read_answer()
            assert answer.status == 200
            assert len(answer.body) == int(answer.headers["Content-Length"]) > 1_000_000
            assert answer.body.endswith(b"\n")
        await client.send(REQUEST.replace(b"GET", b"HEAD"))
        head = await client.read_answer("HEAD")
        assert (head.status, int(head.headers["Content-Length"]) > 1_000_000) == (200, True)
        await client.send(REQUEST)
        assert (await client.read_answer()).status == 200
        await client.close()

    run(scenario, SimulatedHost(vm_count=625, vcpus_per_vm=16))


def test_a_client_that_leaves_in_between_is_no_failure() -> None:
    async def scenario(address: Address) -> None:
        for _ in range(10):
            client = await Client.open(address)
            await client.send(REQUEST)
            await client.reader.read(1000)
            client.writer.transport.abort()
            await client.close()
        assert (await ask(address)).status == 200
        await asyncio.sleep(0)

    run(scenario, SimulatedHost(vm_count=625, vcpus_per_vm=16))


@pytest.mark.parametrize("path", ["/", "/api/v1/vcpus", "/-/healthy"])
def test_an_idle_connection_holds_no_page_either(path: str) -> None:
    async def scenario(address: Address) -> None:
        client = await Client.open(address)
        await client.send(REQUEST.replace(b"/metrics", path.encode()))
        await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.read(1)
        await ask(address)  # the server has done with the first by then
        held = [one for one in gc.get_objects() if isinstance(one, web.Response) and one.body is not None]
        assert held == []
        await client.close()

    run(scenario, SimulatedHost())
