"""What the stall monitor has found out about one VM's vCPUs, as columns of numbers, kept while it finds the same.

Few vCPUs ever take a notify exit. But after a bad microcode update all may do: then the monitor's own columns are taken
as they are, and printed as counters are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Column
from exporter.prometheus.metrics import Metric
from exporter.stalls.verdicts import VmFigures
from kvm.model import Vcpu

COUNTS: Final = (metrics.VCPU_TRACED_EXITS, metrics.VCPU_SAME_RIP_EXITS)


class Known(NamedTuple):
    """All that the lines follow from besides the figures of each vCPU.

    ``traced`` says that counts of traces are to be shown, ``judged`` that something can tell who is stuck; ``notified``
    are the positions of vCPUs that have taken notify exits. By vcpu_id: ``missed`` are those of whose notify exits the
    trigger tells nothing, ``drilled`` those that a drill calls stuck, and ``starts`` tells since when, in Unix seconds,
    those are stuck that are. ``invalid`` counts exits with an invalid context by thread and vcpu_id of the VM's
    process, None where nobody counts, and ``is_alone`` says that the process has no other VM.
    """

    traced: bool
    judged: bool
    notified: Sequence[int]
    missed: Collection[int]
    drilled: Collection[int]
    starts: Mapping[int, float]
    invalid: Mapping[tuple[int, int], int] | None
    is_alone: bool


class VmVerdicts:
    """Makes the columns of one VM; the vCPUs stay the same ones for its life."""

    def __init__(self, vcpus: Sequence[Vcpu], make_template: Callable[[Metric, Sequence[int]], bytes]) -> None:
        """``make_template`` makes the lines of a metric for the vCPUs that stand there; what it raises, we raise."""
        self._vcpus, self._make_template = vcpus, make_template
        self._vcpu_ids = tuple([vcpu.vcpu_id for vcpu in vcpus])
        self._known: Known | None = None
        self._figures = VmFigures()
        self._stuck: tuple[Sequence[int | None], ...] = ()
        self._seldom: list[Column] = []
        """What follows from ``_known`` and ``_stuck``, and changes seldom."""
        self._counted: list[bytes] = []
        """The templates of counts; empty where a vCPU has figures that is not among ours."""
        self._columns: list[Column] = []
        self._templates: dict[Metric, tuple[Sequence[int], bytes]] = {}

    def take_columns(self, known: Known, figures: VmFigures) -> list[Column]:
        """Take whatever is known of each vCPU: the same list as before where nothing has changed."""
        knows_same = known == self._known
        if knows_same and figures is self._figures:
            return self._columns
        self._known = None  # what follows may fail half way
        stuck = figures.vcpu_ids, figures.stuck
        if not knows_same or stuck != self._stuck:
            values = {metrics.VCPU_NO_PROGRESS: _find_stuck(known, figures, self._vcpus), **self._find_known(known)}
            self._seldom = self._make_columns(values)
            places = self._find_places(figures.vcpu_ids)
            self._counted = [self._find_template(metric, places) for metric in COUNTS if places and known.traced]
            self._stuck = stuck
        self._columns = [*self._seldom, *(self._take_counts(figures) if known.traced else ())]
        self._known, self._figures = known, figures
        return self._columns

    @property
    def takes_counts(self) -> bool:
        """Whether the counts that ``take_columns`` took last are the columns of its figures, as they are."""
        return bool(self._counted)

    def _find_places(self, vcpu_ids: Sequence[int]) -> Sequence[int]:
        """Find the places of these vCPUs, none if one is not among ours; both are in the order of their ids."""
        if vcpu_ids == self._vcpu_ids:
            return range(len(self._vcpus))
        places = {vcpu_id: place for place, vcpu_id in enumerate(self._vcpu_ids)}
        return [places[vcpu_id] for vcpu_id in vcpu_ids] if places.keys() >= {*vcpu_ids} else ()

    def _find_known(self, known: Known) -> dict[Metric, Sequence[float | None]]:
        """Find what does not follow from figures."""
        starts = known.starts if known.judged else {}
        return {
            metrics.VCPU_CONTEXT_INVALID: _count_invalid(known, self._vcpus),
            metrics.VCPU_DRILL: [1 if vcpu_id in known.drilled else None for vcpu_id in self._vcpu_ids],
            metrics.VCPU_STALL_START: [*map(starts.get, self._vcpu_ids)],
        }

    def _take_counts(self, figures: VmFigures) -> Iterable[Column]:
        counts = figures.traced_exits, figures.same_rip_exits
        if self._counted:
            return zip(COUNTS, self._counted, counts, strict=True)
        found = [dict(zip(figures.vcpu_ids, column, strict=True)) for column in counts]
        values = {metric: [*map(of.get, self._vcpu_ids)] for metric, of in zip(COUNTS, found, strict=True)}
        return self._make_columns(values)

    def _make_columns(self, values: Mapping[Metric, Sequence[float | None]]) -> list[Column]:
        """Make columns of a number for each vCPU, None for those without a line."""
        columns: list[Column] = []
        for metric, column in values.items():
            if places := [at for at, value in enumerate(column) if value is not None]:
                told = tuple([value for value in column if value is not None])
                columns.append((metric, self._find_template(metric, places), told))
        return columns

    def _find_template(self, metric: Metric, places: Sequence[int]) -> bytes:
        made_for, template = self._templates.get(metric, ((), b""))
        if places != made_for:
            template = self._make_template(metric, places)
            self._templates[metric] = places, template
        return template


def _find_stuck(known: Known, figures: VmFigures, vcpus: Sequence[Vcpu]) -> list[int | None]:
    """Find of each vCPU whether it is stuck, None where that cannot be told."""
    if not known.judged:
        return [None] * len(vcpus)
    found = dict(zip(figures.vcpu_ids, figures.stuck, strict=True))
    # One that nobody tracks took its notify exits before our time: it is not stuck, if its thread is known.
    for at in known.notified:
        vcpu = vcpus[at]
        if vcpu.vcpu_id not in found and vcpu.tid is not None:
            found[vcpu.vcpu_id] = 0
    return [found.get(vcpu.vcpu_id) for vcpu in vcpus]


def _count_invalid(known: Known, vcpus: Sequence[Vcpu]) -> list[int | None]:
    """Count exits with an invalid context of the vCPUs that have taken notify exits, None of those that nobody counts.

    They are counted by process and vcpu_id; where a process has several VMs, only the thread tells them apart.
    """
    counts: list[int | None] = [None] * len(vcpus)
    if known.invalid is None:
        return counts
    for at in known.notified:
        counts[at] = 0
    by_vcpu: Counter[tuple[int | None, int]] = Counter()
    for (tid, vcpu_id), count in known.invalid.items():
        by_vcpu[None if known.is_alone else tid, vcpu_id] += count
    for at in known.notified if by_vcpu or known.missed else ():
        vcpu = vcpus[at]
        count = by_vcpu.get((None if known.is_alone else vcpu.tid, vcpu.vcpu_id), 0)
        # Of a vCPU whose exits go past the trigger, none counted is not none.
        counts[at] = count if count or vcpu.vcpu_id not in known.missed else None
    return counts
