"""What the watch reports of one vCPU that it follows."""

from __future__ import annotations

from typing import Final

from exporter.monitor.tracked_vcpu import Followed
from exporter.stalls.verdicts import VcpuReport, Verdict

WAITS: Final = "others have their turn"


def build_report(vcpu: Followed, verdict: Verdict | None, problem: str, now: float) -> VcpuReport:
    """Report a verdict, None for the newest; ``problem`` is why nothing can be traced. From any thread."""
    progress = vcpu.progress
    return VcpuReport(
        vm=vcpu.vm,
        vcpu=vcpu.vcpu,
        verdict=verdict or progress.verdict,
        source=vcpu.source,
        notify_exits=progress.notify_exits,
        moved_seconds=progress.moved_seconds,
        traced_exits=progress.traced_exits,
        same_rip_exits=progress.same_rip_exits,
        can_judge=not problem and not progress.rip_hidden and vcpu.vcpu.tid is not None,
        put_off=_explain_put_off(vcpu, problem or vcpu.problem, now),
    )


def _explain_put_off(vcpu: Followed, problem: str, now: float) -> str:
    """Say why nobody looks at a vCPU that has moved, "" where somebody does or a look would show nothing."""
    if vcpu.looking or not vcpu.moved:
        return ""
    if problem:
        return f"its exits cannot be traced: {problem}"
    if now < vcpu.look_at:
        return f"the next look is in {vcpu.look_at - now:.1f} s: each vCPU has its share of looks"
    return WAITS if vcpu.wants_look(now) else ""
