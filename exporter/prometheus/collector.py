"""One snapshot of the host as metric families; never raises.

Five collectors make the families, and each can be chosen: ``host``, ``vm``, ``vcpu``, ``exporter``, ``stats``. They
share one snapshot, taken first and timed as ``snapshot``, and what the stall monitor has found, timed as ``monitor``. A
collector that fails loses its own families and nothing else, and says so in ``kvm_exporter_scrape_collector_success``;
a VM that makes no sense loses its own series and counts in ``kvm_exporter_read_errors_total``.

``--vm.include`` and ``--vm.exclude`` decide which VMs have series of their own; the host's sums hold them all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from exporter.build_info import BuildInfo
from exporter.history.increases import IncreaseTracker
from exporter.prometheus import metrics
from exporter.prometheus.counter_series import CounterSeries
from exporter.prometheus.exposition import Family
from exporter.prometheus.grouped_lines import group_lines
from exporter.prometheus.host_series import build_host_families, build_snapshot_families, count_vms, name_labels
from exporter.prometheus.last_moves import LastMoves
from exporter.prometheus.metrics import METRICS, Metric, order_labels
from exporter.prometheus.selection import COLLECTORS, CollectorSettings
from exporter.prometheus.series_warning import SeriesWarning
from exporter.prometheus.shown_vms import Change, ShownVms
from exporter.prometheus.stall_series import StallSeries
from exporter.prometheus.stat_series import StatSeries, check_statistics, has_columns
from exporter.prometheus.verdict_lines import VerdictLines
from exporter.prometheus.vm_series import ShownVm, VcpuSeries, VmSeries
from exporter.stalls.verdicts import MonitorReport
from kvm.errors import MalformedData
from kvm.model import NOTIFY_WINDOW_EXITS, Snapshot, SnapshotReader, SourceReport, VmKey, VmReading
from kvm.read_errors import ReadErrors

log = logging.getLogger(__name__)

T = TypeVar("T")

SNAPSHOT: Final = "snapshot"
SNAPSHOT_FAILED: Final = "snapshot_failed"
MONITOR: Final = "monitor"
DECLARED: Final = frozenset(METRICS)


@dataclass(slots=True)
class _Made:
    """What follows from the VMs and their notify counters, made when it is first asked for: they seldom change.

    ``vms`` is who and how protected they are, ``counts`` how many there are. ``sums`` are their notify exits, and
    ``notified`` those that have taken any: that is all that follows from their counters. ``follows`` says that the
    newest snapshot was taken in to the end.
    """

    vms: list[Family] | None = None
    counts: list[Family] | None = None
    sums: list[Family] | None = None
    notified: set[VmSeries] | None = None
    follows: bool = False


class HostCollector:
    """Reads snapshots through a SnapshotReader and makes families of them; one thread at a time."""

    def __init__(
        self,
        reader: SnapshotReader,
        settings: CollectorSettings,
        build: BuildInfo,
        clock: Callable[[], float],
        read_report: Callable[[], MonitorReport] | None = None,
        *,
        file_states: Mapping[Metric, Callable[[], bool]] = MappingProxyType({}),
        first_total: int = 0,
    ) -> None:
        """``clock`` gives seconds for durations, as time.perf_counter does.

        ``read_report`` returns what the stall monitor has found, ``file_states`` tell whether a file of the agent's own
        is in order. The host's total goes on from ``first_total``.
        """
        self.settings = settings
        self.build = build
        self.snapshot: Snapshot | None = None
        """The newest snapshot: for pages that show how the host is doing without reading it again."""
        self._reader = reader
        self._clock = clock
        self._read_report = read_report
        self._file_states = file_states
        self._verdicts: StallSeries | None = None
        self._increases = IncreaseTracker(first_total)
        self._errors = ReadErrors()
        self._vms = ShownVms(settings, self._errors)
        self._made = _Made()
        self._last_moves = LastMoves(self._increases)
        self._counters = CounterSeries()
        self._verdict_lines = VerdictLines()
        self._statistics = StatSeries()
        self._series_warning = SeriesWarning()

    @property
    def sources(self) -> tuple[SourceReport, ...]:
        """Return how each source did at the newest snapshot; empty before the first."""
        return self.snapshot.sources if self.snapshot else ()

    @property
    def total(self) -> int:
        """Return the host's total of notify exits, as last counted."""
        return self._increases.increases_total

    def collect(self, selected: Collection[str] | None = None) -> list[Family]:
        """Read the host and return the families of that, in the order of the table, none of them empty."""
        names = self.settings.enabled if selected is None else selected
        duration, success = Family(metrics.SCRAPE_DURATION), Family(metrics.SCRAPE_SUCCESS)
        build = Family(metrics.BUILD_INFO)
        build.add(order_labels(metrics.BUILD_INFO, **name_labels(metrics.BUILD_INFO, self.build)), 1)
        families = {family.metric: family for family in (duration, success, build)}
        for metric, is_in_order in self._file_states.items():
            families[metric] = Family(metric)
            families[metric].add((), int(is_in_order()))

        def run(name: str, collector: Callable[[], list[Family]]) -> bool:
            started = self._clock()
            made = self._run(name, collector)
            duration.add((name,), self._clock() - started)
            success.add((name,), int(made is not None))
            families.update((family.metric, family) for family in made or () if family.chunks)
            return made is not None

        self._verdicts = None
        is_read = run(SNAPSHOT, self._read_host)
        if is_read and self._read_report is not None:
            run(MONITOR, self._take_report)
        collectors = {
            "host": self._collect_host,
            "vm": self._collect_vms,
            "vcpu": self._collect_vcpus,
            "exporter": self._collect_sources,
            "stats": self._collect_statistics,
        }
        for name in (name for name in COLLECTORS if name in names):
            if is_read:
                run(name, collectors[name])
            else:
                success.add((name,), 0)
        if not is_read and "exporter" in names:
            # Absent would be no evidence of anything: whoever has read nothing has missed every VM.
            complete, reasons = Family(metrics.COMPLETE), Family(metrics.INCOMPLETE_REASON)
            complete.add((), 0)
            reasons.add((SNAPSHOT_FAILED,), 1)
            families |= {family.metric: family for family in (complete, reasons)}
        made = [families[metric] for metric in METRICS if metric in families]
        if "stats" in names:
            made += [family for metric, family in families.items() if metric not in DECLARED]
            self._series_warning.look(made)
        return made

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()

    def _run(self, name: str, collector: Callable[[], list[Family]]) -> list[Family] | None:
        try:
            return collector()
        except Exception as err:
            log.error("collector failed", extra={"fields": {"collector": name, "err": repr(err)}})
            log.debug("collector failed", extra={"fields": {"collector": name}}, exc_info=True)
            return None

    def _read_host(self) -> list[Family]:
        snapshot = self._reader.read()
        made, self._made = self._made, _Made()  # for the next time, should anything here fail half way
        change = self._vms.take(snapshot)
        if change is Change.NOTHING and made.follows:
            self._increases.observe_same(snapshot)
        else:
            self._increases.observe(snapshot)
            made = _Made(made.vms, made.counts) if change is Change.NOTIFY_COUNTERS else _Made()
        made.follows = True
        self._made = made
        self._errors.log_new(reading.vm for reading in snapshot.readings)
        self.snapshot = snapshot
        return []

    def _take_report(self) -> list[Family]:
        snapshot = self._snapshot()
        if self._read_report is not None:
            offset = snapshot.unix_seconds - snapshot.monotonic_seconds
            with_counters = self.settings.vcpu_series is not VcpuSeries.NONE
            self._verdicts = StallSeries(self._read_report(), snapshot.readings, offset, with_counters=with_counters)
        return []

    def _ask_vms(self, vms: Iterable[ShownVm], ask: Callable[[VmSeries, VmReading], T]) -> Iterator[tuple[ShownVm, T]]:
        """Ask for something of each VM; one that makes no sense is recorded and left out."""
        for shown in vms:
            reading, lines = shown
            try:
                answer = ask(lines, reading)
            except Exception as err:  # noqa: BLE001 - one VM's nonsense costs that VM's series only
                why = str(err) if isinstance(err, MalformedData) else repr(err)
                self._errors.record(reading.source, reading.vm.key, "malformed", why)
            else:
                yield shown, answer

    def _collect_vms(self) -> list[Family]:
        made = self._made
        vms = self._render_vms() if made.vms is None else made.vms
        return vms + (self._render_sums() if made.sums is None else made.sums)

    def _render_vms(self) -> list[Family]:
        found = list(self._ask_vms(self._vms.shown, VmSeries.render_vm))
        families = group_lines(lines for _, lines in found)
        for family in families:
            family.join()
        if len(found) == len(self._vms.shown):  # else who made no sense is asked again
            self._made.vms = families
        return families

    def _render_sums(self) -> list[Family]:
        families = self._counters.render_sums_as_before(self._vms.shown, self._increases.sums)
        if not families:
            found = list(self._ask_vms(self._vms.shown, VmSeries.take_sum))
            families = self._counters.render_sums(found)
            if len(found) < len(self._vms.shown):
                return families
        self._made.sums = families
        return families

    def _collect_vcpus(self) -> list[Family]:
        with_series, verdicts = self.settings.vcpu_series is not VcpuSeries.NONE, self._verdicts
        if not with_series:
            return self._collect_verdicts(self._vms.shown) if verdicts else []
        if families := self._counters.render_as_before(self._vms.shown):
            return families + self._collect_verdicts(self._vms.shown)
        found = list(self._ask_vms(self._vms.shown, VmSeries.take_columns))
        is_all = len(found) == len(self._vms.shown) and self.settings.vcpu_series is VcpuSeries.ALL
        families = self._counters.render_vcpus(found, is_all=is_all)
        return families + self._collect_verdicts([shown for shown, _ in found])

    def _collect_verdicts(self, vms: Sequence[ShownVm]) -> list[Family]:
        """Collect when vCPUs took notify exits and what the stall monitor says of them: few VMs have any, or all."""
        with_series, verdicts = self.settings.vcpu_series is not VcpuSeries.NONE, self._verdicts
        moved = self._increases.moved_vms if with_series else ()
        concerned = vms if self._increases.all_moved_at is not None else self._find_concerned(vms, moved)
        families = self._verdict_lines.render(concerned, verdicts, self._ask_vms) if verdicts else []
        last_moves = [self._last_moves.render(concerned, self._ask_vms)] if moved else []
        return [*families, *last_moves]

    def _find_concerned(self, vms: Sequence[ShownVm], moved: Collection[VmKey]) -> Sequence[ShownVm]:
        """Find the VMs of which there is something to tell besides counters."""
        verdicts = self._verdicts
        notified = self._find_notified() if verdicts else ()
        if len(notified) == len(self._vms.shown):
            return vms
        keys = {*moved, *verdicts.vms} if verdicts else moved
        if not notified and not keys:
            return []
        return [(reading, lines) for reading, lines in vms if lines in notified or reading.vm.key in keys]

    def _find_notified(self) -> Collection[VmSeries]:
        """Find the VMs that have taken notify exits, before our time or in it."""
        if self._made.notified is None:
            columns = [
                (lines, reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)) for reading, lines in self._vms.shown
            ]
            self._made.notified = {lines for lines, column in columns if column and any(column)}
        return self._made.notified

    def _collect_statistics(self) -> list[Family]:
        shown: Iterable[ShownVm] = self._vms.shown
        if any(has_columns(reading) for reading, _ in shown):
            shown = [vm for vm, _ in self._ask_vms(shown, lambda _lines, reading: check_statistics(reading))]
        return self._statistics.collect((lines.vm_label, reading) for reading, lines in shown)

    def _collect_host(self) -> list[Family]:
        snapshot, made = self._snapshot(), self._made
        if made.counts is None:
            made.counts = count_vms(snapshot.readings)
        # To Prometheus, a total that stands still says: no exits.
        total = self._increases.increases_total if self._increases.readable and not snapshot.is_blind else None
        found = self._verdicts.build_host_families() if self._verdicts else []
        return [*build_host_families(snapshot, total), *(made.counts if snapshot.complete else ()), *found]

    def _collect_sources(self) -> list[Family]:
        snapshot = self._snapshot()
        up, errors = Family(metrics.SOURCE_UP), Family(metrics.READ_ERRORS)
        for name, works in {report.source: report.up for report in snapshot.sources}.items():
            up.add((name,), int(works))
        for (source, kind), count in sorted((Counter(snapshot.errors) + Counter(self._errors.counts)).items()):
            errors.add(order_labels(metrics.READ_ERRORS, source=source, kind=kind), count)
        return [
            *build_snapshot_families(snapshot),
            up,
            errors,
            *(self._verdicts.build_monitor_families() if self._verdicts else ()),
        ]

    def _snapshot(self) -> Snapshot:
        if self.snapshot is None:
            raise LookupError("no snapshot has been taken")
        return self.snapshot
