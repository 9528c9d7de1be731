"""What the stall monitor has found, as sample lines: of one VM's vCPUs, of the host, of the monitor itself.

Few vCPUs ever take a notify exit. But after a bad microcode update all may do: so lines are kept by ``VmSeries`` until
they change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Family
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vm_series import Rendered, VmSeries
from exporter.stalls.verdicts import THREAD_KINDS, AgentUsage, MonitorReport, State, VcpuFigures, VmFigures
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

NOT_KNOWN: Final = (State.UNKNOWN, State.CONTEXT_LOST)
NO_FIGURES: Final = VmFigures({}, 0)
_IS_STUCK: Final[Mapping[tuple[State, bool], int | None]] = {
    (state, can_judge): 1 if state is State.STALLED else 0 if can_judge and state not in NOT_KNOWN else None
    for state in State
    for can_judge in (False, True)
}
"""By a vCPU's state, and whether it can be judged."""


class _Known(NamedTuple):
    """All that the lines about one VM's vCPUs follow from.

    ``traced`` says that counts of traces are to be shown, ``judged`` that something can tell who is stuck; ``notified``
    are the positions of vCPUs that have taken notify exits. By vcpu_id: ``missed`` are those of whose notify exits the
    trigger tells nothing, ``drilled`` those that a drill calls stuck, and ``starts`` tells since when, in Unix seconds,
    those are stuck that are. ``invalid`` counts exits with an invalid context by thread and vcpu_id of the VM's
    process, None where nobody counts, and ``is_alone`` says that the process has no other VM.
    """

    traced: bool
    judged: bool
    figures: VmFigures
    notified: Sequence[int]
    missed: Collection[int]
    drilled: Collection[int]
    starts: Mapping[int, float]
    invalid: Mapping[tuple[int, int], int] | None
    is_alone: bool


class StallSeries:
    """Renders one report of the stall monitor, for one snapshot."""

    def __init__(self, report: MonitorReport, readings: Iterable[VmReading], unix_offset: float) -> None:
        """``unix_offset`` is by how many seconds Unix time is ahead of CLOCK_MONOTONIC."""
        self._report, self._unix_offset = report, unix_offset
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
        self._invalid: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        for (pid, start_ticks, tid, vcpu_id), count in (report.context_invalid or {}).items():
            self._invalid.setdefault((pid, start_ticks), {})[tid, vcpu_id] = count

    def concerns(self, reading: VmReading) -> bool:
        """Tell whether there is anything to say of a VM's vCPUs: of nearly all there is not."""
        if any(reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())):
            return True
        key = reading.vm.key
        return key in self._found or key in self._drills

    def render_vcpus(self, reading: VmReading, lines: VmSeries, with_counters: bool) -> Rendered:
        """Render what was found out about the vCPUs of one VM; ``with_counters`` for more than what alerts need."""
        known = self._find_known(reading, with_counters)
        before, rendered = lines.verdicts
        if before != known:
            rendered = _render_known(known, reading, lines)
            lines.verdicts = known, rendered
        return rendered

    def _find_known(self, reading: VmReading, with_counters: bool) -> _Known:
        key, report = reading.vm.key, self._report
        figures, process = self._found.get(key, NO_FIGURES), key[:2]
        return _Known(  # by position, which is faster: this is asked of every VM of a flooded host
            with_counters and not report.problem,
            not report.problem,
            figures,
            _find_notified(reading),
            self._missed.get(key, ()),
            self._drills.get(key, ()),
            self._find_starts(figures) if figures.stalled else {},
            None if report.context_invalid is None else self._invalid.get(process, {}),
            self._vms.get(process, 0) <= 1,
        )

    def _find_starts(self, figures: VmFigures) -> dict[int, float]:
        return {
            vcpu_id: round(found.stuck_since_seconds + self._unix_offset, 3)
            for vcpu_id, found in figures.vcpus.items()
            if found.stuck_since_seconds is not None
        }

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
    return [at for at, count in enumerate(column) if count] if 0 in column else range(len(column))


def _render_known(known: _Known, reading: VmReading, lines: VmSeries) -> Rendered:
    """Render columns: a value of each vCPU, in the reading's order, None of those of which nothing is told."""
    figures = [*map(known.figures.vcpus.get, [vcpu.vcpu_id for vcpu in reading.vcpus])]
    traced, stuck = figures if known.traced else [], _judge(known, figures, reading)
    columns: tuple[tuple[Metric, Sequence[int | None]], ...] = (
        (metrics.VCPU_TRACED_EXITS, [None if found is None else found.traced_exits for found in traced]),
        (metrics.VCPU_SAME_RIP_EXITS, [None if found is None else found.same_rip_exits for found in traced]),
        (metrics.VCPU_CONTEXT_INVALID, _count_invalid(known, reading)),
        (metrics.VCPU_NO_PROGRESS, stuck),
        (metrics.VCPU_DRILL, [1 if vcpu.vcpu_id in known.drilled else None for vcpu in reading.vcpus]),
    )
    rendered: Rendered = []
    for metric, column in columns:
        rendered += lines.render_counts(metric, column)
    starts = [
        None if told is None else known.starts.get(vcpu.vcpu_id)
        for vcpu, told in zip(reading.vcpus, stuck if known.starts else (), strict=False)
    ]
    return rendered + lines.render_times(metrics.VCPU_STALL_START, starts)


def _judge(known: _Known, figures: Sequence[VcpuFigures | None], reading: VmReading) -> list[int | None]:
    """Tell which vCPUs are stuck: None of those of which it is not known, or not asked."""
    if not known.judged:
        return []
    # One that nobody tracks took its notify exits before our time: it is not stuck, if its thread is known.
    untracked = {at: 0 for at in known.notified if figures[at] is None and reading.vcpus[at].tid is not None}
    return [
        untracked.get(at) if found is None else _IS_STUCK[found.state, found.can_judge]
        for at, found in enumerate(figures)
    ]


def _count_invalid(known: _Known, reading: VmReading) -> list[int | None]:
    """Count exits with an invalid context of the vCPUs that have taken notify exits, None of those that nobody counts.

    They are counted by process and vcpu_id; where a process has several VMs, only the thread tells them apart.
    """
    counts: list[int | None] = [None] * len(reading.vcpus)
    if known.invalid is None:
        return counts
    for at in known.notified:
        counts[at] = 0
    by_vcpu: Counter[tuple[int | None, int]] = Counter()
    for (tid, vcpu_id), count in known.invalid.items():
        by_vcpu[None if known.is_alone else tid, vcpu_id] += count
    for at in known.notified if by_vcpu or known.missed else ():
        vcpu = reading.vcpus[at]
        count = by_vcpu.get((None if known.is_alone else vcpu.tid, vcpu.vcpu_id), 0)
        # Of a vCPU whose exits go past the trigger, none counted is not none.
        counts[at] = count if count or vcpu.vcpu_id not in known.missed else None
    return counts


def _build_usage_families(usage: AgentUsage) -> list[Family]:
    threads, cpu, switches = Family(metrics.THREADS), Family(metrics.THREAD_CPU), Family(metrics.CONTEXT_SWITCHES)
    threads.add((), usage.threads)
    for kind in THREAD_KINDS:
        cpu.add((kind,), usage.cpu_seconds[kind])
    switches.add(("involuntary",), usage.involuntary_switches)
    switches.add(("voluntary",), usage.voluntary_switches)
    return [threads, cpu, switches]
