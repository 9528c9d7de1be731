"""What ``/api/v1/vcpus`` answers: each vCPU that has taken notify exits, what is known of it, since when.

RIPs and owners are for clients that are known only, as ``access`` has it.
"""

from __future__ import annotations

from exporter.stalls.verdicts import MonitorReport, State, VcpuReport, name_vector, render_rip
from kvm.model import Snapshot


def build_document(
    report: MonitorReport, snapshot: Snapshot | None, now: float, unix: float, with_details: bool
) -> dict[str, object]:
    """Return what is known as plain data; ``with_details`` for RIPs and owners.

    ``snapshot`` is the newest one, None before the first: without it an empty list of vCPUs would say that all is well
    where VMs cannot be seen. ``now`` is CLOCK_MONOTONIC, ``unix`` the same moment in Unix time.
    """
    offset = unix - now
    spots = () if snapshot is None else snapshot.blind_spots
    unread = None if snapshot is None else sum(not reading.source for reading in snapshot.readings)
    return {
        "unix_seconds": round(unix, 3),
        "complete": None if snapshot is None else snapshot.complete,
        "incomplete_reasons": sorted({spot.reason for spot in spots}),
        "unread_vms": unread,
        "trigger": report.trigger or None,
        "trigger_problem": report.trigger_problem or None,
        "poll_period_seconds": report.poll_period_seconds,
        "problem": report.problem or None,
        "evidence": None if report.problem else report.evidence,
        "details": with_details,
        "vcpus": [_build_vcpu(vcpu, offset, with_details) for vcpu in _sort(report.vcpus)],
    }


def _sort(reports: tuple[VcpuReport, ...]) -> list[VcpuReport]:
    """Put what matters first."""
    order = [State.CONTEXT_LOST, State.STALLED, State.SUSPECT, State.UNKNOWN, State.RECOVERED]
    ranks = {state: rank for rank, state in enumerate(order)}
    return sorted(reports, key=lambda r: (ranks.get(r.verdict.state, len(ranks)), r.vm.id, r.vcpu.index))


def _build_vcpu(report: VcpuReport, offset: float, with_details: bool) -> dict[str, object]:
    verdict = report.verdict

    def date(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds + offset, 3)

    document: dict[str, object] = {
        "vm": report.vm.id,
        "vcpu": report.vcpu.index,
        "state": verdict.state,
        "reason": verdict.reason or None,
        "evidence": verdict.evidence,
        "deferred_reason": report.deferred_reason or None,
        "since_unix_seconds": date(verdict.since_seconds),
        "stuck_since_unix_seconds": date(verdict.stuck_since_seconds),
        "last_notify_exit_unix_seconds": date(report.moved_seconds),
        "notify_window_exits": report.notify_exits,
        "traced_exits": report.traced_exits,
        "same_rip_exits": report.same_rip_exits,
        "streak": verdict.streak,
        "exits_at_rip": verdict.exits,
        "registers_alike": verdict.registers_alike,
        "cpu_percent_of_thread": None if verdict.cpu_percent is None else round(verdict.cpu_percent, 1),
        "nested": verdict.nested,
        "nested_guest_unjudged": verdict.nested_unjudged,
        "context_invalid": verdict.context_invalid or verdict.state is State.CONTEXT_LOST,
        "delivering": name_vector(verdict.idt_vectoring) or None,
        "source": report.source or None,
        "drill": report.drill,
    }
    if with_details:
        owner = report.vm.owner
        document |= {
            "rip": None if verdict.rip is None else render_rip(verdict.rip),
            "instruction": None if report.instruction is None else report.instruction.code.hex(" "),
            "name": owner.name,
            "display_name": owner.display_name,
            "project": owner.project,
            "namespace": owner.namespace,
            "vmm": owner.vmm,
            "pid": report.vm.key.pid,
            "tid": report.vcpu.tid,
        }
    return document
