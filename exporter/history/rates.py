"""What the notify counters did in the last minutes: for rates and small plots, from snapshots that are taken anyway.

Whole columns are kept, a VM at a time: one that is unchanged costs nothing, nor does a host without a change. Snapshots
of the same VMs wait until somebody asks, or until there are ``MAX_WAITING``, and are taken in together: so a VM, cold
in memory, is touched once for all of them.

Snapshots come when they come: what happened between two of them is known as an average. Where a counter has moved and
there was no snapshot for ``GAP_SECONDS``, or where it fell, the plot has a gap; where it has not moved, its rate was 0
however long there was none.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from exporter.history.changes import NotifyCounters, find_notify_counters
from exporter.history.rate_estimate import GAP_SECONDS, RATE_SECONDS, find_fast_rate, find_sparse_rate
from exporter.history.steps import SPACING_SECONDS, Step, widen_steps
from kvm.model import Snapshot, VmKey

WINDOW_SECONDS: Final = 300.0
# A rate is of now if the newest snapshot is no older than this.
NOW_SECONDS: Final = 15.0
# Where more numbers than this would be kept, they are kept at longer distances.
MAX_NUMBERS: Final = 120_000
# So many VMs that are gone are remembered, the last ones.
MAX_GONE: Final = 5000
# So many snapshots wait to be taken in: of 10,000 vCPUs that move 0.4 MB each.
MAX_WAITING: Final = 8
# The vcpu_id of what is known of a VM as a whole.
WHOLE_VM: Final = -1


class _Sample(NamedTuple):
    seconds: float
    vcpu_ids: tuple[int, ...]
    column: tuple[int, ...]


@dataclass(slots=True)
class _Samples:
    """The samples of one VM in order of time; a run of snapshots without a change is its first and its last one."""

    kept: list[_Sample] = field(default_factory=list)

    @property
    def moves(self) -> bool:
        first = self.kept[0].column
        return self.kept[-1].column is not first or any(sample.column is not first for sample in self.kept)

    def stays(self, vcpu_ids: tuple[int, ...], column: tuple[int, ...] | None, now: float) -> bool:
        """Take in, as fast as can be, that nothing has happened for long: nearly all VMs of nearly all snapshots."""
        if len(self.kept) != 2:
            return False
        (_, _, first), (_, known_ids, last) = self.kept
        if first is not last:
            return False
        # The same objects, where the source keeps them: comparing numbers would take as long as all the rest.
        if column is not last and column != last:
            return False
        if vcpu_ids is not known_ids and vcpu_ids != known_ids:
            return False
        self.kept[1] = _Sample(now, known_ids, last)
        return True

    def add(self, sample: _Sample, spacing: float) -> None:
        kept = self.kept
        last = kept[-1] if kept else None
        is_same = last is not None and last.column == sample.column and last.vcpu_ids == sample.vcpu_ids
        if last is not None and is_same:
            sample = _Sample(sample.seconds, last.vcpu_ids, last.column)
        if len(kept) > 1:
            before = kept[-2]
            is_dense = sample.seconds - before.seconds < spacing and not self._ended_rest(spacing)
            if is_dense or (is_same and before.column is sample.column):
                kept[-1] = sample
                return
        kept.append(sample)

    def _ended_rest(self, spacing: float) -> bool:
        """Tell whether the last sample is the first after a rest: when that was is kept as exactly as it is known."""
        if len(self.kept) < 3:
            return False
        began, ended, moved = self.kept[-3:]
        return began.column is ended.column is not moved.column and ended.seconds - began.seconds >= spacing

    def forget_before(self, seconds: float) -> None:
        """Forget all that ended before; the last sample of that time is where the next step begins."""
        if len(self.kept) > 1 and self.kept[1].seconds <= seconds:
            del self.kept[: sum(1 for sample in self.kept if sample.seconds <= seconds) - 1]


class RateHistory:
    """The last ``WINDOW_SECONDS`` of every notify counter; may be asked and fed from any thread."""

    def __init__(self) -> None:
        self._vms: dict[VmKey, _Samples] = {}
        self._spacing = SPACING_SECONDS
        self._lock = threading.Lock()
        self._newest_seconds = -math.inf
        self._composition: object = None
        self._shown: list[tuple[VmKey, tuple[int, ...]]] = []
        """The VMs of the newest snapshot, each with its vcpu_ids: those of all that wait, too."""
        self._waiting: list[tuple[float, NotifyCounters]] = []
        """The snapshots that wait to be taken in, in order of time."""
        self._newest: NotifyCounters = ([], [])
        self._repeats = False
        """Whether the last one that waits shows what the one before it showed: the next may stand in its place."""

    def observe(self, snapshot: Snapshot) -> None:
        """Take in a snapshot; one that is not the newest is left out."""
        counters, now = find_notify_counters(snapshot), snapshot.monotonic_seconds
        with self._lock:
            if now <= self._newest_seconds:
                return
            self._newest_seconds = now
            is_same = snapshot.composition is self._composition
            if not is_same or len(self._waiting) >= MAX_WAITING:
                self._catch_up()
            if not is_same:
                self._shown = [(reading.vm.key, reading.counters.vcpu_ids) for reading in snapshot.readings]
                self._composition = snapshot.composition
            repeats = is_same and counters == self._newest
            if repeats and self._repeats:
                self._waiting.pop()
            if not repeats:
                self._newest = counters
            self._waiting.append((now, self._newest))
            self._repeats = repeats

    def _catch_up(self) -> None:
        """Take in what waits."""
        waiting, self._waiting, self._repeats = self._waiting, [], False
        if not waiting:
            return
        now, moving = waiting[-1][0], 0
        for place, (key, vcpu_ids) in enumerate(self._shown):
            samples, stays = self._vms.get(key), True
            for seconds, (columns, totals) in waiting:
                if samples is not None and samples.stays(vcpu_ids, columns[place], seconds):
                    continue
                sample = _make_sample(seconds, vcpu_ids, columns[place], totals[place])
                if sample is not None:
                    stays, samples = False, samples or _Samples()
                    samples.add(sample, self._spacing)
                    self._vms[key] = samples  # no sooner than it has one
            if samples is not None and not stays:
                samples.forget_before(now - WINDOW_SECONDS)
                moving += len(samples.kept[-1].column) * samples.moves
        self._spacing = max(SPACING_SECONDS, WINDOW_SECONDS * moving / MAX_NUMBERS)
        self._forget_gone(now)

    def _forget_gone(self, now: float) -> None:
        gone = [(samples.kept[-1].seconds, key) for key, samples in self._vms.items() if samples.kept[-1].seconds < now]
        too_many = max(0, len(gone) - MAX_GONE)
        if too_many:
            gone.sort()
        for number, (seconds, key) in enumerate(gone):
            if number < too_many or seconds < now - WINDOW_SECONDS:
                del self._vms[key]

    def find_rates(self, key: VmKey, now: float) -> dict[int, float | None]:
        """Return a VM's notify exits a second of late by vcpu_id; None, or no key, where that is not known."""
        with self._lock:
            self._catch_up()
            samples = self._vms.get(key)
            kept = list(samples.kept) if samples else []
        if len(kept) < 2 or now - kept[-1].seconds > NOW_SECONDS:
            return {}
        last = kept[-1]
        wanted = last.seconds - RATE_SECONDS
        # Where the rate is to begin is known as nearly as there are samples around.
        position = max((i for i, sample in enumerate(kept[:-1]) if sample.seconds <= wanted), default=0)
        first, second = kept[position], kept[position + 1]
        oldest, befores, afters = (_arrange(sample, last.vcpu_ids) for sample in (kept[0], first, second))
        rates: dict[int, float | None] = {}
        for vcpu_id, was, before, after, number in zip(
            last.vcpu_ids, oldest, befores, afters, last.column, strict=True
        ):
            if was == number:  # nearly all there are
                rates[vcpu_id] = 0.0
                continue
            rate = find_fast_rate(wanted, last.seconds, (first.seconds, before), (second.seconds, after), number)
            rates[vcpu_id] = find_sparse_rate(_iterate_back(kept, vcpu_id)) if rate is None else rate
        return rates

    def find_steps(self, key: VmKey, vcpu_id: int, now: float) -> list[Step]:
        """Return the rates of the last WINDOW_SECONDS in order of time; what is not known is left out."""
        with self._lock:
            self._catch_up()
            numbers = list(self._iterate(key, vcpu_id))
        start, steps = now - WINDOW_SECONDS, list[Step]()
        for (began, before), (ended, after) in pairwise(numbers):
            if ended > start and (after == before or (after > before and ended - began <= GAP_SECONDS)):
                steps.append(Step(max(began, start), ended, (after - before) / (ended - began)))
        return widen_steps(steps)

    def _iterate(self, key: VmKey, vcpu_id: int) -> Iterator[tuple[float, int]]:
        """Yield a counter's numbers with their times, from the last sample on that has another set of vCPUs."""
        samples = self._vms.get(key)
        if samples is None:
            return
        vcpu_ids = samples.kept[-1].vcpu_ids
        if vcpu_id not in vcpu_ids:
            return
        position = vcpu_ids.index(vcpu_id)
        for sample in samples.kept:
            if sample.vcpu_ids is vcpu_ids or sample.vcpu_ids == vcpu_ids:
                yield sample.seconds, sample.column[position]
            elif vcpu_id in sample.vcpu_ids:
                yield sample.seconds, sample.column[sample.vcpu_ids.index(vcpu_id)]


def _iterate_back(kept: Sequence[_Sample], vcpu_id: int) -> Iterator[tuple[float, int]]:
    """Yield a counter's numbers with their times, the newest first, as far back as the vCPU was there."""
    vcpu_ids: tuple[int, ...] = ()
    position = 0
    for sample in reversed(kept):
        if sample.vcpu_ids is not vcpu_ids:
            if vcpu_id not in sample.vcpu_ids:
                return
            vcpu_ids, position = sample.vcpu_ids, sample.vcpu_ids.index(vcpu_id)
        yield sample.seconds, sample.column[position]


def _arrange(sample: _Sample, vcpu_ids: tuple[int, ...]) -> Sequence[int | None]:
    """Return the numbers of a sample in another one's order."""
    if sample.vcpu_ids == vcpu_ids:
        return sample.column
    numbers = dict(zip(sample.vcpu_ids, sample.column, strict=True))
    return [numbers.get(vcpu_id) for vcpu_id in vcpu_ids]


def _make_sample(
    seconds: float, vcpu_ids: tuple[int, ...], column: tuple[int, ...] | None, total: int | None
) -> _Sample | None:
    if column is not None:
        return _Sample(seconds, vcpu_ids, column) if len(column) == len(vcpu_ids) else None
    return None if total is None else _Sample(seconds, (WHOLE_VM,), (total,))
