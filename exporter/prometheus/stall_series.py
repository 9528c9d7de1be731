"""What the stall monitor has found, as sample lines: of one VM's vCPUs, of the host, of the monitor itself.

Few vCPUs ever take a notify exit, so nothing is kept here from snapshot to snapshot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Family, render_sample
from exporter.prometheus.metrics import Metric
from exporter.stalls.verdicts import THREAD_KINDS, AgentUsage, MonitorReport, State, VcpuReport
from kvm.model import NOTIFY_WINDOW_EXITS, Vcpu, VcpuKey, VmKey, VmReading

_FIGURES: Final[tuple[tuple[Metric, str], ...]] = (
    (metrics.POLL_PERIOD, "poll_period_seconds"),
    (metrics.TRIGGER_MISSED, "trigger_missed"),
    (metrics.TRACED_VCPUS, "traced_vcpus"),
    (metrics.TRACE_ARMINGS, "armings"),
    (metrics.TRACE_RECORDS, "records"),
    (metrics.TRACE_LOST_RECORDS, "lost_records"),
    (metrics.TRACE_BUDGET_EXHAUSTED, "budget_exhausted"),
    (metrics.WARNINGS, "warnings"),
    (metrics.WARNINGS_SUPPRESSED, "warnings_suppressed"),
)


class StallSeries:
    """Renders one report of the stall monitor, for one snapshot."""

    def __init__(self, report: MonitorReport, readings: Iterable[VmReading], unix_offset: float) -> None:
        """``unix_offset`` is by how many seconds Unix time is ahead of CLOCK_MONOTONIC."""
        self._report, self._unix_offset = report, unix_offset
        self._vms: Counter[tuple[int, int]] = Counter()
        if report.context_invalid:
            self._vms.update(reading.vm.key[:2] for reading in readings)
        self._found: dict[VmKey, dict[int, VcpuReport]] = {}
        self._drills: dict[VmKey, dict[int, VcpuReport]] = {}
        for vcpu in report.vcpus:
            place = self._drills if vcpu.drill else self._found
            place.setdefault(vcpu.vm.key, {})[vcpu.vcpu.vcpu_id] = vcpu
        self._invalid: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        for (pid, start_ticks, tid, vcpu_id), count in (report.context_invalid or {}).items():
            self._invalid.setdefault((pid, start_ticks), {})[tid, vcpu_id] = count

    def concerns(self, reading: VmReading) -> bool:
        """Tell whether there is anything to say of a VM's vCPUs: of nearly all there is not."""
        if any(reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())):
            return True
        key = reading.vm.key
        return key in self._found or key in self._drills

    def render_vcpus(self, reading: VmReading, with_counters: bool) -> Iterator[tuple[Metric, str]]:
        """Yield what was found out about the vCPUs of one VM; ``with_counters`` for more than what alerts need."""
        found, drills = self._found.get(reading.vm.key, {}), self._drills.get(reading.vm.key, {})
        column = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())
        notified = [vcpu for vcpu, count in zip(reading.vcpus, column, strict=False) if count]
        if with_counters and not self._report.problem:
            yield from _render_traces(reading, found)
        if self._report.context_invalid is not None:
            for vcpu in notified:
                count = self._count_invalid(reading.vm.key, vcpu)
                # Of a vCPU whose exits go past the trigger, none counted is not none.
                if count or VcpuKey(reading.vm.key, vcpu.vcpu_id) not in self._report.missed_vcpus:
                    yield _render(metrics.VCPU_CONTEXT_INVALID, reading, vcpu, count)
        for vcpu in reading.vcpus:
            report, drill = found.get(vcpu.vcpu_id), drills.get(vcpu.vcpu_id)
            stuck = self._judge(vcpu, report, vcpu in notified)
            if stuck is not None:
                yield _render(metrics.VCPU_NO_PROGRESS, reading, vcpu, int(stuck))
            if stuck and report is not None and report.verdict.stuck_since_seconds is not None:
                start = round(report.verdict.stuck_since_seconds + self._unix_offset, 3)
                yield _render(metrics.VCPU_STALL_START, reading, vcpu, start)
            if drill is not None and drill.verdict.state is State.STALLED:
                yield _render(metrics.VCPU_DRILL, reading, vcpu, 1)

    def build_host_families(self) -> list[Family]:
        """Return what is known of the whole host."""
        stuck, interval = Family(metrics.HOST_NO_PROGRESS), Family(metrics.HOST_INTERVAL_MIN)
        if not self._report.problem:
            reports = [vcpu for vcpus in self._found.values() for vcpu in vcpus.values()]
            stuck.add((), sum(report.verdict.state is State.STALLED for report in reports))
        for window, seconds in sorted(self._report.interval_min_seconds.items()):
            interval.add((str(window),), seconds)
        return [stuck, interval]

    def build_monitor_families(self) -> list[Family]:
        """Return how the monitor is doing."""
        evidence = Family(metrics.EVIDENCE)
        if not self._report.problem:
            evidence.add((self._report.evidence,), 1)
        families = [evidence]
        for metric, name in _FIGURES:
            family = Family(metric)
            family.add((), getattr(self._report, name))
            families.append(family)
        if self._report.agent_usage is not None:
            families += _build_usage_families(self._report.agent_usage)
        return families

    def _judge(self, vcpu: Vcpu, found: VcpuReport | None, has_notified: bool) -> bool | None:
        """Tell whether a vCPU is stuck, None where that is not known or not asked; of drills this knows nothing."""
        if self._report.problem:
            return None
        if found is None:
            return False if has_notified and vcpu.tid is not None else None
        if found.verdict.state is State.STALLED:
            return True
        return False if found.can_judge and found.verdict.state not in (State.UNKNOWN, State.CONTEXT_LOST) else None

    def _count_invalid(self, key: VmKey, vcpu: Vcpu) -> int:
        """Count by process and vcpu_id; where a process has several VMs, only the thread tells them apart."""
        is_alone = self._vms[key[:2]] <= 1
        counts = self._invalid.get(key[:2], {}).items()
        return sum(n for (tid, vcpu_id), n in counts if vcpu_id == vcpu.vcpu_id and (is_alone or tid == vcpu.tid))


def _build_usage_families(usage: AgentUsage) -> list[Family]:
    threads, cpu, switches = Family(metrics.THREADS), Family(metrics.THREAD_CPU), Family(metrics.CONTEXT_SWITCHES)
    threads.add((), usage.threads)
    for kind in THREAD_KINDS:
        cpu.add((kind,), usage.cpu_seconds[kind])
    switches.add(("involuntary",), usage.involuntary_switches)
    switches.add(("voluntary",), usage.voluntary_switches)
    return [threads, cpu, switches]


def _render_traces(reading: VmReading, found: Mapping[int, VcpuReport]) -> Iterator[tuple[Metric, str]]:
    for vcpu in reading.vcpus:
        report = found.get(vcpu.vcpu_id)
        if report is not None:
            yield _render(metrics.VCPU_TRACED_EXITS, reading, vcpu, report.traced_exits)
            yield _render(metrics.VCPU_SAME_RIP_EXITS, reading, vcpu, report.same_rip_exits)


def _render(metric: Metric, reading: VmReading, vcpu: Vcpu, value: float) -> tuple[Metric, str]:
    return metric, render_sample(metric, (str(vcpu.index), reading.vm.id), value)
