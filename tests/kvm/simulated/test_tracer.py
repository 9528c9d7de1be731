"""The simulated host's stall, from the counter to the line and back: what the demo shows."""

from __future__ import annotations

import asyncio
import logging

import pytest

from exporter.monitor.backends import Backends
from exporter.monitor.stall_monitor import StallMonitor
from exporter.monitor.vcpu_reader import make_vcpu_reader
from exporter.stalls.verdicts import StallRule, State
from kvm.errors import VmGone
from kvm.simulated.host import CYCLE_SECONDS, STUCK_EXITS_PER_SECOND, STUCK_FROM_SECONDS, STUCK_SECONDS, SimulatedHost
from kvm.simulated.tracer import STUCK_RIP, SimulatedTracer
from tests.virtual_time import run_inline, run_virtual

CYCLES = 3


def test_each_cycle_shows_one_stall_and_one_recovery_and_nobody_else_is_stalled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> list[tuple[str, str, State, int | None]]:
        loop = asyncio.get_running_loop()
        host = SimulatedHost(loop.time, lambda: 1.8e9 + loop.time())
        means = Backends(reader=host, tracer=SimulatedTracer(host), read_vcpu=make_vcpu_reader(host.read_vcpu))
        watch = StallMonitor(means, rule=StallRule(), unix=lambda: 1.8e9 + loop.time(), run=run_inline)
        stop = asyncio.Event()
        running = asyncio.create_task(watch.run(stop))
        seen = []
        for second in range(round(CYCLES * CYCLE_SECONDS)):
            await asyncio.sleep(1.0)
            for report in watch.report().vcpus:
                verdict = report.verdict
                seen.append((report.vm.owner.name, str(second % CYCLE_SECONDS), verdict.state, verdict.rip))
        stop.set()
        await running
        assert watch.report().warnings == CYCLES
        assert watch.report().interval_min_seconds[128_000] == pytest.approx(1 / STUCK_EXITS_PER_SECOND)
        return seen

    seen = run_virtual(main())
    stalled = {(name, rip) for name, _, state, rip in seen if state is State.STALLED}
    assert stalled == {("batch-1", STUCK_RIP)}
    seconds = [float(second) for name, second, state, _ in seen if state is State.STALLED]
    assert STUCK_FROM_SECONDS < min(seconds) < STUCK_FROM_SECONDS + 4
    assert STUCK_FROM_SECONDS + STUCK_SECONDS - 2 < max(seconds) < STUCK_FROM_SECONDS + STUCK_SECONDS + 12
    lines = [record.getMessage() for record in caplog.records if "progress" in record.getMessage()]
    assert (
        lines
        == [
            "SIMULATED, not real: vCPU makes no forward progress",
            "SIMULATED, not real: vCPU makes progress again",
        ]
        * CYCLES
    )


def test_threads_that_are_not_there_cannot_be_armed() -> None:
    host = SimulatedHost()
    with pytest.raises(VmGone):
        SimulatedTracer(host).arm(1)
    key = host.read().readings[0].vm.key
    assert host.read_vcpu(key, 99) is None
    assert host.read_vcpu(key._replace(pid=1), 0) is None
