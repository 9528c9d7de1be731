"""What the stall monitor has found, as sample lines: of one VM's vCPUs, of the host, of the monitor itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Column, Family
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vm_series import VmSeries
from exporter.prometheus.vm_verdicts import Known
from exporter.stalls.verdicts import THREAD_KINDS, AgentUsage, MonitorReport, State, VmFigures
from kvm.model import NOTIFY_WINDOW_EXITS, VmKey, VmReading

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

NO_FIGURES: Final = VmFigures()


class StallSeries:
    """Renders one report of the stall monitor, for one snapshot."""

    def __init__(
        self, report: MonitorReport, readings: Iterable[VmReading], unix_offset: float, *, with_counters: bool
    ) -> None:
        """``unix_offset`` is by how many seconds Unix time is ahead of CLOCK_MONOTONIC.

        ``with_counters`` is for more of vCPUs than alerts need.
        """
        self._report, self._unix_offset = report, unix_offset
        self._judged = not report.problem
        self.traced = with_counters and self._judged
        """Whether counts of traces are told."""
        self._vms: Counter[tuple[int, int]] = Counter()
        if report.context_invalid:
            self._vms.update(reading.vm.key[:2] for reading in readings)
        self._found = report.figures
        self._missed: dict[VmKey, set[int]] = {}
        for missed in report.missed_vcpus:
            self._missed.setdefault(missed.vm, set()).add(missed.vcpu_id)
        self._drills: dict[VmKey, set[int]] = {}
        for vcpu in report.vcpus:
            if vcpu.drill and vcpu.verdict.state is State.STALLED:
                self._drills.setdefault(vcpu.vm.key, set()).add(vcpu.vcpu.vcpu_id)
        self._usual: dict[Sequence[int], Known] = {}
        self._invalid: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        for (pid, start_ticks, tid, vcpu_id), count in (report.context_invalid or {}).items():
            self._invalid.setdefault((pid, start_ticks), {})[tid, vcpu_id] = count

    @property
    def vms(self) -> Collection[VmKey]:
        """The VMs of which something was found out, though their counters may be 0: of nearly all nothing was."""
        return self._found.keys() | self._drills.keys()

    def find_figures(self, reading: VmReading) -> VmFigures:
        """Find the figures of a VM's vCPUs, of none where nothing was found out."""
        return self._found.get(reading.vm.key, NO_FIGURES)

    def find_basis(self, readings: Sequence[VmReading], figures: Sequence[VmFigures]) -> tuple[object, ...]:
        """Find all that columns of these VMs are made from, but for counts of traces: equal where it is the same."""
        columns = [reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ()) for reading in readings]
        return (
            (self.traced, self._judged, self._missed, self._drills, self._invalid, self._vms),
            self._report.context_invalid is None,
            [of.vcpu_ids for of in figures],
            [of.stuck for of in figures],
            [self._find_starts(of) for of in figures if of.stalled],
            # Of most hosts no vCPU has taken any, but in a flood all have.
            [*map(len, columns)] if all(map(all, columns)) else [*map(_find_notified, readings)],
        )

    def _is_usual(self, key: VmKey, figures: VmFigures) -> bool:
        """Tell whether of a VM nothing but its figures is known, as of nearly all."""
        if figures.stalled or key in self._missed or key in self._drills:
            return False
        return not self._invalid or key[:2] not in self._invalid

    def take_columns(self, lines: VmSeries, reading: VmReading) -> list[Column]:
        """Take what was found out about the vCPUs of one VM."""
        key = reading.vm.key
        figures, notified = self.find_figures(reading), _find_notified(reading)
        if not self._is_usual(key, figures):
            known = self._make_known(reading, figures, notified)
        else:  # the same of one VM as of the other
            known = self._usual.get(notified) or self._make_known(reading, figures, notified)
            self._usual[notified] = known
        return lines.verdicts.take_columns(known, figures)

    def _make_known(self, reading: VmReading, figures: VmFigures, notified: Sequence[int]) -> Known:
        key, report = reading.vm.key, self._report
        process = key[:2]
        return Known(
            self.traced,
            self._judged,
            notified,
            self._missed.get(key, ()),
            self._drills.get(key, ()),
            self._find_starts(figures) if figures.stalled else {},
            None if report.context_invalid is None else self._invalid.get(process, {}),
            self._vms.get(process, 0) <= 1,
        )

    def _find_starts(self, figures: VmFigures) -> dict[int, float]:
        found = zip(figures.vcpu_ids, figures.stuck_since_seconds, strict=True)
        return {vcpu_id: round(since + self._unix_offset, 3) for vcpu_id, since in found if since is not None}

    def build_host_families(self) -> list[Family]:
        """Return what is known of the whole host."""
        stuck, interval = Family(metrics.HOST_NO_PROGRESS), Family(metrics.HOST_INTERVAL_MIN)
        if not self._report.problem:
            stuck.add((), sum(found.stalled for found in self._found.values()))
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


def _find_notified(reading: VmReading) -> Sequence[int]:
    column = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())[: len(reading.vcpus)]
    return tuple([at for at, count in enumerate(column) if count]) if 0 in column else range(len(column))


def _build_usage_families(usage: AgentUsage) -> list[Family]:
    threads, cpu, switches = Family(metrics.THREADS), Family(metrics.THREAD_CPU), Family(metrics.CONTEXT_SWITCHES)
    threads.add((), usage.threads)
    for kind in THREAD_KINDS:
        cpu.add((kind,), usage.cpu_seconds[kind])
    switches.add(("involuntary",), usage.involuntary_switches)
    switches.add(("voluntary",), usage.voluntary_switches)
    return [threads, cpu, switches]
