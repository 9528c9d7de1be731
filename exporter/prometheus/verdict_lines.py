"""What the stall monitor has found about the vCPUs of all VMs, as sample lines.

Few vCPUs ever take a notify exit, but after a bad microcode update all of a host may do. From one scrape to the next
nothing then is new but counts of traces, and they are put into the lines of the scrape before, of all VMs at once: to
ask each VM for its columns takes three times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.prometheus.counter_series import CounterSeries
from exporter.prometheus.exposition import Family
from exporter.prometheus.shown_vms import AskVms
from exporter.prometheus.stall_series import StallSeries
from exporter.prometheus.vm_series import ShownVm
from exporter.prometheus.vm_verdicts import COUNTS


class VerdictLines:
    """Renders what is known of each vCPU, and keeps lines from scrape to scrape."""

    def __init__(self) -> None:
        self._counters = CounterSeries()
        self._basis: tuple[object, ...] | None = None
        """What the lines of the scrape before were made from, counts of traces apart; None if they may not be used."""
        self._others: list[Family] = []
        """Those lines, but for the counts."""

    def render(self, vms: Sequence[ShownVm], verdicts: StallSeries, ask: AskVms) -> list[Family]:
        """Render what is known of the vCPUs of these VMs."""
        readings = [reading for reading, _ in vms]
        figures = [*map(verdicts.find_figures, readings)]
        basis = [lines for _, lines in vms], *verdicts.find_basis(readings, figures)
        if basis == self._basis:
            counted = [of_vm for of_vm in figures if of_vm.vcpu_ids] if verdicts.traced else []
            counts = [of_vm.traced_exits for of_vm in counted], [of_vm.same_rip_exits for of_vm in counted]
            return [*self._others, *map(self._counters.refill, COUNTS if counted else (), counts)]
        self._basis = None  # what follows may fail half way
        found = list(ask(vms, verdicts.take_columns))
        families = self._counters.render(columns for _, columns in found)
        with_figures = [lines for of_vm, (_, lines) in zip(figures, vms, strict=True) if of_vm.vcpu_ids]
        takes_counts = not verdicts.traced or all(lines.verdicts.takes_counts for lines in with_figures)
        if takes_counts and len(found) == len(vms):
            self._basis, self._others = basis, [family for family in families if family.metric not in COUNTS]
        return families
