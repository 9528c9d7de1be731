"""The pages about stalls: ``/api/v1/vcpus``, and the drill."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from aiohttp import web

from exporter.history.recorder import SnapshotRecorder
from exporter.stalls import drill
from exporter.stalls.verdicts import MonitorReport, VcpuReport
from exporter.web import vcpus_json
from exporter.web.access import PRIVATE_HEADERS, sees_details
from exporter.web.document import Document
from exporter.web.renderings import Renderings
from exporter.web.settings import DRILL_HEADER

PAUSE_SECONDS: Final = 240.0  # after a drill's end


class Watcher(Protocol):
    """What the server asks about stalls."""

    def report(self) -> MonitorReport:
        """Return what is known now; from any thread."""
        ...

    async def start_drill(self, name: str) -> VcpuReport:
        """Begin a drill with a VM; raises NoDrill."""
        ...


class StallHandlers:
    """The handlers; ``watcher`` is None where nobody watches, ``recorder`` has the newest snapshot.

    Where every vCPU of a large host takes notify exits, what is known of them is megabytes: it is made for all who ask
    together, and ``turn_away`` answers who asks for one more document than there may be.
    """

    def __init__(
        self,
        watcher: Watcher | None,
        recorder: SnapshotRecorder,
        turn_away: Callable[[], web.Response | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watcher, self._recorder, self._turn_away, self._clock = watcher, recorder, turn_away, clock
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vcpus")
        self._renderings = Renderings(self._render_vcpus, self._worker)
        self._next_drill_at = 0.0

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Give the thread back when the application ends."""
        yield
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def answer_vcpus(self, request: web.Request) -> web.StreamResponse:
        """Say what is known of the vCPUs that take notify exits; RIPs and owners to clients that are known only."""
        refusal = self._turn_away()
        if refusal is not None:
            return refusal
        parts = await self._renderings.render(sees_details(request))
        return Document(parts, {**PRIVATE_HEADERS, "Content-Type": "application/json; charset=utf-8"})

    def _render_vcpus(self, with_details: bool) -> list[bytes]:
        report = self._watcher.report() if self._watcher else MonitorReport(problem="not watched")
        snapshot = self._recorder.snapshot
        document = vcpus_json.build_document(report, snapshot, time.monotonic(), time.time(), with_details)
        return [json.dumps(document).encode()]

    async def answer_drill(self, request: web.Request) -> web.Response:
        """Begin a drill, for clients that are known and mean it."""
        if not sees_details(request):
            return _refuse(403, "a drill is for root at the Unix socket, or for who has a password or a certificate")
        if DRILL_HEADER not in request.headers or "Origin" in request.headers:
            return _refuse(403, f"a drill takes the header {DRILL_HEADER}, which no web page can send")
        if self._watcher is None:
            return _refuse(409, "this agent does not watch for stalls")
        left_seconds = self._next_drill_at - self._clock()
        if left_seconds > 0:
            # Whoever is called must be able to tell a drill from a stall: not one after the other.
            return _refuse(429, f"the last drill was just now; the next one may begin in {left_seconds:.0f} s")
        try:
            begun = await self._watcher.start_drill(request.query.get("vm", ""))
        except drill.NoDrill as err:
            return _refuse(409, str(err))
        self._next_drill_at = self._clock() + drill.DRILL_SECONDS + PAUSE_SECONDS
        vm = f"VM {begun.vm.id} ({begun.vm.owner.name or 'no name'})"
        where = "in the log, in kvm_vcpu_drill and in the API"
        message = f"vCPU {begun.vcpu.index} of {vm} is {begun.verdict.state} for {drill.DRILL_SECONDS:.0f} s, {where}"
        return web.json_response({"message": message})


def _refuse(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", content_type="text/plain")
