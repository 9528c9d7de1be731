"""What the stall monitor has found about the vCPUs of all VMs, as sample lines.

Few vCPUs ever take a notify exit, but after a bad microcode update all of a host may do. From one scrape to the next
nothing then is new but counts of traces, and they are put into the lines of the scrape before, of all VMs at once: to
ask each VM for its columns takes three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from exporter.prometheus.counter_series import CounterSeries
from exporter.prometheus.exposition import Column, Family
from exporter.prometheus.stall_series import StallSeries
from exporter.prometheus.vm_series import ShownVm, VmSeries
from exporter.prometheus.vm_verdicts import COUNTS
from kvm.model import VmReading

Ask = Callable[
    [Iterable[ShownVm], Callable[[VmSeries, VmReading], list[Column]]], Iterable[tuple[ShownVm, list[Column]]]
]
"""Asks VMs for their columns, and leaves out those that make no sense."""


class VerdictLines:
    """Renders what is known of each vCPU, and keeps lines from scrape to scrape."""

    def __init__(self) -> None:
        self._counters = CounterSeries()
        self._causes: tuple[object, ...] | None = None
        """What all but counts followed from in the scrape before, None where it cannot be taken up again."""
        self._seldom: list[Family] = []

    def render(self, vms: Sequence[ShownVm], verdicts: StallSeries, ask: Ask) -> list[Family]:
        """Render what is known of the vCPUs of these VMs."""
        readings = [reading for reading, _ in vms]
        figures = [*map(verdicts.find_figures, readings)]
        causes = [lines for _, lines in vms], *verdicts.find_causes(readings, figures)
        if causes == self._causes:
            told = [of for of in figures if of.vcpu_ids] if verdicts.traced else []
            counts = [of.traced_exits for of in told], [of.same_rip_exits for of in told]
            return [*self._seldom, *map(self._counters.refill, COUNTS if told else (), counts)]
        self._causes = None  # what follows may fail half way
        found = list(ask(vms, verdicts.take_columns))
        families = self._counters.render(columns for _, columns in found)
        with_figures = [lines for of, (_, lines) in zip(figures, vms, strict=True) if of.vcpu_ids]
        takes_counts = not verdicts.traced or all(lines.verdicts.takes_counts for lines in with_figures)
        if takes_counts and len(found) == len(vms):
            self._causes, self._seldom = causes, [family for family in families if family.metric not in COUNTS]
        return families
