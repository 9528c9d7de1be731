"""The lines about one VM's vCPUs that follow from what the stall monitor has found, kept while it finds the same.

Few vCPUs ever take a notify exit. But after a bad microcode update all may do: then a scrape looks at those only whose
figures are others than in the scrape before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from exporter.prometheus import metrics
from exporter.prometheus.grouped_lines import Rendered
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vcpu_lines import VcpuLines
from exporter.stalls.verdicts import FIGURES_BLOCK, State, VcpuFigures, VmFigures
from kvm.model import Vcpu

_NOT_KNOWN: Final = (State.UNKNOWN, State.CONTEXT_LOST)
_IS_STUCK: Final[Mapping[tuple[State, bool], int | None]] = {
    (state, can_judge): 1 if state is State.STALLED else 0 if can_judge and state not in _NOT_KNOWN else None
    for state in State
    for can_judge in (False, True)
}
"""By a vCPU's state, and whether it can be judged."""


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


Found = tuple[int, VcpuFigures | None]
"""Where a vCPU stands, and what was found out about it, None for nothing."""


class VmVerdicts:
    """Renders what is known of the vCPUs of one VM; the vCPUs stay the same ones for its life."""

    def __init__(self, vcpus: Sequence[Vcpu], open_lines: Callable[[Metric], VcpuLines]) -> None:
        """``open_lines`` makes the lines of a metric for these vCPUs; what it raises, ``render`` does."""
        self._vcpus, self._open_lines = vcpus, open_lines
        self._vcpu_ids = [vcpu.vcpu_id for vcpu in vcpus]
        self._known: Known | None = None
        self._figures: VmFigures | None = None
        self._places: dict[int, list[int]] = {}
        """Where the vCPUs of each block of figures stand, once it is asked."""
        self._lines: dict[Metric, VcpuLines] = {}
        self._rendered: Rendered = {}

    def render(self, known: Known, figures: VmFigures) -> Rendered:
        """Render whatever is known of each vCPU: the same object as before where nothing has changed."""
        knows_same = known == self._known
        if knows_same and figures is self._figures:
            return self._rendered
        self._known = None  # what follows may fail half way
        if knows_same and self._figures is not None:
            self._put_figures(known, self._find_changes(self._figures, figures))
        else:
            self._put_known(known)
            found = figures.vcpus
            self._put_figures(known, [(at, found.get(vcpu_id)) for at, vcpu_id in enumerate(self._vcpu_ids)])
        self._rendered = {metric: texts for metric, lines in self._lines.items() if (texts := lines.render())}
        self._known, self._figures = known, figures
        return self._rendered

    def _find_changes(self, before: VmFigures, now: VmFigures) -> list[Found]:
        """Find the vCPUs whose figures are other objects than before."""
        if not self._places:
            for at, vcpu_id in enumerate(self._vcpu_ids):
                self._places.setdefault(vcpu_id // FIGURES_BLOCK, []).append(at)
        changed: list[Found] = []
        for number in before.blocks.keys() | now.blocks.keys():
            old, new = before.blocks.get(number, {}), now.blocks.get(number, {})
            if new is old:
                continue
            for at in self._places.get(number, ()):
                figures = new.get(self._vcpu_ids[at])
                if figures is not old.get(self._vcpu_ids[at]):
                    changed.append((at, figures))
        return changed

    def _put_known(self, known: Known) -> None:
        """Put in what does not follow from figures."""
        starts = known.starts if known.judged else {}
        columns: Mapping[Metric, Sequence[float | None]] = {
            metrics.VCPU_CONTEXT_INVALID: _count_invalid(known, self._vcpus),
            metrics.VCPU_DRILL: [1 if vcpu_id in known.drilled else None for vcpu_id in self._vcpu_ids],
            metrics.VCPU_STALL_START: [*map(starts.get, self._vcpu_ids)],
        }
        for metric, column in columns.items():
            if metric in self._lines or any(value is not None for value in column):
                self._open(metric).put_all(column)

    def _put_figures(self, known: Known, changed: Iterable[Found]) -> None:
        notified: Collection[int] | None = None
        for at, figures in changed:
            if figures is not None:
                self._put(metrics.VCPU_TRACED_EXITS, at, figures.traced_exits if known.traced else None)
                self._put(metrics.VCPU_SAME_RIP_EXITS, at, figures.same_rip_exits if known.traced else None)
                stuck = _IS_STUCK[figures.state, figures.can_judge] if known.judged else None
                self._put(metrics.VCPU_NO_PROGRESS, at, stuck)
                continue
            notified = set(known.notified) if notified is None else notified
            # One that nobody tracks took its notify exits before our time: it is not stuck, if its thread is known.
            is_judged = known.judged and at in notified and self._vcpus[at].tid is not None
            self._put(metrics.VCPU_TRACED_EXITS, at, None)
            self._put(metrics.VCPU_SAME_RIP_EXITS, at, None)
            self._put(metrics.VCPU_NO_PROGRESS, at, 0 if is_judged else None)

    def _put(self, metric: Metric, at: int, value: int | None) -> None:
        if value is not None or metric in self._lines:
            self._open(metric).put(at, value)

    def _open(self, metric: Metric) -> VcpuLines:
        lines = self._lines.get(metric)
        if lines is None:
            lines = self._lines[metric] = self._open_lines(metric)
        return lines


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
