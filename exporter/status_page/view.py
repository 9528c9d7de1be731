"""What the status page shows: the vCPUs that have taken notify exits, worst first, and what of them a search finds.

A ``StatusView`` is made once for all readers; searching it and taking the first few rows is cheap, however many vCPUs
there are. Names, owners and RIPs can be found only by clients that see them (``exporter.web.access``): a search that
finds what it does not show gives it away all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final

from exporter.history.rates import WHOLE_VM, RateHistory
from exporter.history.steps import Step
from exporter.stalls.verdicts import MonitorReport, State, VcpuReport, render_rip
from kvm.model import NOTIFY_WINDOW_EXITS, Protection, Snapshot, Vcpu, Vm, VmKey, VmReading

SHOWN_ROWS: Final = 50
SHOWN_QUIET_ROWS: Final = 20
SHOWN_NAMES: Final = 3
MAX_QUERY: Final = 100
MAX_WORDS: Final = 8
SIMULATED: Final = "simulated"


@dataclass(slots=True)
class Row:
    """One vCPU, or, with ``vcpu`` None, a VM of which only the sum is known or nothing has happened.

    ``state`` is None where the stall monitor has nothing to say; ``notify_exits`` None where no number was read.
    """

    vm: Vm
    vcpu: Vcpu | None
    reading: VmReading | None
    state: State | None
    report: VcpuReport | None = None
    notify_exits: int | None = None
    rate: float | None = None
    steps: Sequence[Step] = ()
    _texts: tuple[str, str] | None = None

    @property
    def drill(self) -> bool:
        """Whether this is about an alarm that somebody tests."""
        return self.report is not None and self.report.drill

    @property
    def history_id(self) -> int:
        """Return by what the history knows the counter."""
        return WHOLE_VM if self.vcpu is None else self.vcpu.vcpu_id

    def find_text(self, with_details: bool) -> str:
        """Return the text that a search goes through."""
        if self._texts is None:
            state, owner = self.state or "", self.vm.owner
            public = f"{self.vm.id} {state} {'drill' if self.drill else ''}".casefold()
            private = f"{owner.name} {owner.display_name} {owner.project} {owner.namespace} {owner.vmm}".casefold()
            rip = self.report.verdict.rip if self.report else None
            where = f"{self.vm.key.pid} {'' if rip is None else render_rip(rip)}"
            self._texts = (public, f"{public} {private} {where}")
        return self._texts[with_details]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found: the first ``rows`` of ``matching`` out of ``all_rows``, and VMs without notify exits."""

    query: str
    rows: list[Row]
    matching: int
    all_rows: int
    quiet: list[Row]
    quiet_matching: int


@dataclass(frozen=True, slots=True)
class StatusView:
    """What there is to show at one moment; ``now`` is CLOCK_MONOTONIC, ``unix`` the same moment in Unix time.

    ``snapshot`` is the newest one, None before the first; ``report`` is what the stall monitor knows, None where
    there is none. ``groups`` are the rows by state and whether they are drills.
    """

    now: float
    unix: float
    snapshot: Snapshot | None
    report: MonitorReport | None
    history: RateHistory
    rows: list[Row]
    groups: Mapping[tuple[State | None, bool], list[Row]]

    def find(self, query: str, with_details: bool) -> Found:
        """Return the worst rows that match; each word of a query has to be somewhere in a row."""
        words = query.casefold().split()

        def matches(row: Row) -> bool:
            text = row.find_text(with_details)
            return all(word in text for word in words)

        matching = [row for row in self.rows if matches(row)] if words else self.rows
        shown = nsmallest(SHOWN_ROWS, matching, key=_rank)
        for row in (row for row in shown if not row.drill):
            row.steps = self.history.find_steps(row.vm.key, row.history_id, self.now)
        quiet = [row for row in self._iterate_quiet() if matches(row)] if words else []
        return Found(query, shown, len(matching), len(self.rows), quiet[:SHOWN_QUIET_ROWS], len(quiet))

    def find_in(self, *states: State, drill: bool = False) -> list[Row]:
        """Return the rows in these states, drills or what is real."""
        return [row for state in states for row in self.groups.get((state, drill), ())]

    def find_real(self) -> list[Row]:
        """Return the rows that are no drills."""
        return [row for (_state, drill), rows in self.groups.items() if not drill for row in rows]

    def count_protections(self) -> dict[Protection, int]:
        """Return how many VMs there are in each state, those with any."""
        readings = self.snapshot.readings if self.snapshot else ()
        counts = Counter(reading.protection for reading in readings)
        return {state: counts[state] for state in Protection if counts[state]}

    def count_vcpus(self) -> int | None:
        """Return how many vCPUs there are, None where that is not known."""
        counts = [reading.vcpu_count for reading in self.snapshot.readings] if self.snapshot else [None]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def simulated(self) -> bool:
        """Whether the host is simulated."""
        return self.snapshot is not None and any(source.source == SIMULATED for source in self.snapshot.sources)

    def _iterate_quiet(self) -> Iterator[Row]:
        busy = {row.vm.key for row in self.rows}
        for reading in self.snapshot.readings if self.snapshot else ():
            if reading.vm.key not in busy:
                state = None if reading.notify_exits is None else State.QUIET
                yield Row(reading.vm, None, reading, state, notify_exits=reading.notify_exits)


def make_status_view(
    snapshot: Snapshot | None, report: MonitorReport | None, history: RateHistory, now: float, unix: float
) -> StatusView:
    """Put together what is known at one moment."""
    rows = list(_iterate_rows(snapshot, report))
    rates: dict[VmKey, dict[int, float | None]] = {}
    groups: dict[tuple[State | None, bool], list[Row]] = {}
    for row in rows:
        key = row.vm.key
        if key not in rates:
            rates[key] = history.find_rates(key, now)
        row.rate = None if row.drill else rates[key].get(row.history_id)
        groups.setdefault((row.state, row.drill), []).append(row)
    return StatusView(now, unix, snapshot, report, history, rows, groups)


def clean_query(text: str) -> str:
    """Return the first words of a query, each once: what no keyboard has is no part of it."""
    words = "".join(character if character.isprintable() else " " for character in text[: 4 * MAX_QUERY]).split()
    return " ".join(list(dict.fromkeys(words))[:MAX_WORDS])[:MAX_QUERY].rstrip()


def read_counts(reading: VmReading) -> dict[int, int]:
    """Return a VM's notify counters by vcpu_id, or its sum; empty where neither was read."""
    counters = reading.counters
    column = counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
    if column is not None:
        return dict(zip(counters.vcpu_ids, column, strict=False))
    total = counters.totals.get(NOTIFY_WINDOW_EXITS)
    return {} if total is None else {WHOLE_VM: total}


def _iterate_rows(snapshot: Snapshot | None, report: MonitorReport | None) -> Iterator[Row]:
    """Yield what the stall monitor reports, and what took notify exits before it was there."""
    readings = {reading.vm.key: reading for reading in (snapshot.readings if snapshot else ())}
    told: set[tuple[VmKey, int]] = set()
    for found in report.vcpus if report else ():
        if not found.drill:
            told.add((found.vm.key, found.vcpu.vcpu_id))
        reading, count = readings.get(found.vm.key), found.notify_exits
        if count is None and reading is not None:
            count = read_counts(reading).get(found.vcpu.vcpu_id)
        yield Row(found.vm, found.vcpu, reading, found.verdict.state, found, count)
    for reading in readings.values():
        yield from _iterate_untold(reading, told, report)


def _iterate_untold(
    reading: VmReading, told: Iterable[tuple[VmKey, int]], report: MonitorReport | None
) -> Iterator[Row]:
    column = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
    if column is None:
        total = reading.counters.totals.get(NOTIFY_WINDOW_EXITS)
        if total:
            yield Row(reading.vm, None, reading, None, notify_exits=total)
        return
    if not any(column):  # nearly all there are
        return
    # What has not moved since the monitor is there is quiet; a monitor that tracks nothing says nothing.
    state = State.QUIET if report is not None and report.trigger else None
    for vcpu, count in zip(reading.vcpus, column, strict=False):
        if count and (reading.vm.key, vcpu.vcpu_id) not in told:
            yield Row(reading.vm, vcpu, reading, state, notify_exits=count)


_SEVERITIES: Final[Mapping[State | None, int]] = {State.CONTEXT_LOST: 0, State.STALLED: 1, State.SUSPECT: 2}


def rank_stuck(row: Row) -> tuple[float, str, int]:
    """Return where a vCPU that may be stuck stands among those like it: which has been so for longest comes first."""
    since = row.report.verdict.stuck_since_seconds if row.report else None
    return (math.inf if since is None else since, row.vm.id, row.history_id)


def _rank(row: Row) -> tuple[int, bool, float, float, str, int]:
    """Return where a row stands. Rates count by their magnitude, so that rows do not swap places all the time."""
    severity = _SEVERITIES.get(row.state, 4)
    if row.state is State.UNKNOWN and row.report and row.report.verdict.stuck_since_seconds is not None:
        severity = 3
    if severity < 4:
        since, vm_id, history_id = rank_stuck(row)
        return (severity, row.drill, since, 0, vm_id, history_id)
    magnitude = round(2 * math.log2(row.rate)) if row.rate else -math.inf
    return (severity, row.drill, -magnitude, -(row.notify_exits or 0), row.vm.id, row.history_id)
