"""A stall monitor on a simulated host, in virtual time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from exporter.monitor.backends import Backends, PollMode, ReadInstruction, Run
from exporter.monitor.stall_monitor import StallMonitor
from exporter.monitor.trace_budget import Limits
from exporter.stalls.verdicts import StallRule, State, VcpuReport
from tests.fake_host import FakeHost, FakeTrigger, FakeVm
from tests.reports import with_figures
from tests.virtual_time import run_inline, run_virtual


@dataclass
class Scene:
    """A running stall monitor on a simulated host."""

    host: FakeHost
    monitor: StallMonitor

    def state(self, vm: FakeVm, vcpu: int = 0) -> State:
        """What the monitor says of a vCPU; one that it has not heard of is quiet."""
        found = self.find(vm, vcpu)
        return found.verdict.state if found else State.QUIET

    def find(self, vm: FakeVm, vcpu: int = 0) -> VcpuReport | None:
        report = self.monitor.report()
        if not report.problem:
            # What metrics are made of is what the verdicts say.
            assert with_figures(report).figures == report.figures
        reports = [r for r in report.vcpus if r.vm.key == vm.key and r.vcpu.index == vcpu]
        return reports[-1] if reports else None

    async def wait_for(self, vm: FakeVm, state: State, seconds: float = 10.0, vcpu: int = 0) -> float:
        """Wait for a state; returns how long it took."""
        began = self.host.clock()
        while self.state(vm, vcpu) is not state:
            assert self.host.clock() < began + seconds, (self.state(vm, vcpu), self.find(vm, vcpu))
            await asyncio.sleep(0.005)
            self.host.settle()
        return self.host.clock() - began


def play(
    act: Callable[[Scene], Awaitable[None]],
    *vms: FakeVm,
    trigger: bool = False,
    registers: bool = True,
    cpu_time: bool = True,
    poll: PollMode = PollMode.AUTO,
    prepare: Callable[[FakeHost], None] = lambda host: None,
    make_trigger: Callable[[FakeTrigger], None] = lambda trigger: None,
    rule: StallRule | None = None,
    limits: Limits | None = None,
    run: Run = run_inline,
    unix: Callable[[], float] | None = None,
    may_run_tds: bool = False,
    read_instruction: ReadInstruction | None = None,
) -> FakeHost:
    """Run a stall monitor in virtual time while something happens; nothing may be left behind."""

    async def main() -> FakeHost:
        loop = asyncio.get_running_loop()
        host = FakeHost(loop.time, *vms)
        prepare(host)

        def open_trigger(on_call: Callable[..., None]) -> FakeTrigger:
            made = host.make_trigger(on_call)
            make_trigger(made)
            return made

        backends = Backends(
            reader=host,
            tracer=host,
            read_vcpu=host.read_vcpu if registers else None,
            open_pidfd=host.hold,
            is_thread=host.is_thread,
            read_cpu_time=host.read_cpu_time if cpu_time else None,
            may_run_tds=lambda: may_run_tds,
            rip_sources=lambda: host.rip_sources if host.is_patched else (),
            make_trigger=open_trigger if trigger else None,
            read_instruction=read_instruction,
        )
        monitor = StallMonitor(
            backends,
            rule=rule or StallRule(),
            limits=limits,
            poll=poll,
            unix=unix or (lambda: 1.8e9 + loop.time()),
            run=run,
        )
        stop = asyncio.Event()
        running = asyncio.create_task(monitor.run(stop))
        living = asyncio.create_task(host.live())
        await asyncio.sleep(0.5)
        try:
            await act(Scene(host, monitor))
        finally:
            living.cancel()
            stop.set()
            await asyncio.wait_for(running, 60)
        return host

    fds = set(os.listdir("/proc/self/fd"))
    host = run_virtual(main())
    for _, write in host.pidfds.values():
        os.close(write)
    assert set(os.listdir("/proc/self/fd")) == fds
    assert not any(vcpu.armed for vcpu in host.vcpus())
    assert (host.closed, host.warm) == (True, False)
    return host


def read_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [
        {"msg": record.getMessage(), **record.fields}  # type: ignore[attr-defined]
        for record in caplog.records
        if "vCPU" in record.getMessage() and "name" in getattr(record, "fields", {})
    ]
