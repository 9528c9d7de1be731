"""Simulated verdicts about simulated vCPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from exporter.monitor.figure_columns import build_vm_figures
from exporter.stalls.verdicts import (
    THREAD_KINDS,
    AgentUsage,
    Evidence,
    MonitorReport,
    State,
    VcpuFigures,
    VcpuReport,
    Verdict,
)
from kvm.model import Owner, Vcpu, Vm, VmKey

RIP = 0xFFFFFFFF81012345


USAGE = AgentUsage(9, dict.fromkeys(THREAD_KINDS, 1.5), 100, 7)


def make_vm(name: str = "web", pid: int = 4242) -> Vm:
    owner = Owner("qemu", name=name, uuid=f"uuid-{pid}", project="shop")
    return Vm(f"uuid-{pid}", VmKey(pid, 77, 9), owner, 1.7e9)


def make_verdict(state: State = State.STALLED, since: float = 100.0, **fields: Any) -> Verdict:  # noqa: ANN401
    values: dict[str, Any] = {
        "reason": "it took 40 notify exits in a row at one RIP",
        "rip": RIP,
        "streak": 64,
        "exits": 40,
        "stuck_since_seconds": 99.0,
        "registers_alike": True,
        "nested": False,
        "episode": 1,
        "evidence": Evidence.TRACE,
    }
    return Verdict(state, since, **(values | fields))


def with_figures(report: MonitorReport) -> MonitorReport:
    """Give a report the figures that the stall monitor would have of its vCPUs, drills apart."""
    vcpus: dict[VmKey, dict[int, VcpuFigures]] = {}
    for found in report.vcpus:
        if not found.drill:
            stuck_since = found.verdict.stuck_since_seconds if found.verdict.state is State.STALLED else None
            vcpus.setdefault(found.vm.key, {})[found.vcpu.vcpu_id] = VcpuFigures(
                found.verdict.state, stuck_since, found.traced_exits, found.same_rip_exits, found.can_judge
            )
    return replace(report, figures={key: build_vm_figures(of_vm) for key, of_vm in vcpus.items()})


def make_report(
    state: State = State.STALLED,
    *,
    vm: Vm | None = None,
    vcpu: int = 0,
    drill: bool = False,
    source: str = "bpf",
    **fields: Any,  # noqa: ANN401
) -> VcpuReport:
    return VcpuReport(
        vm=vm or make_vm(),
        vcpu=Vcpu(vcpu, 2 * vcpu, 5000 + vcpu),
        verdict=make_verdict(state, **fields),
        source=source,
        notify_exits=1234,
        moved_seconds=99.5,
        traced_exits=64,
        same_rip_exits=63,
        drill=drill,
    )
