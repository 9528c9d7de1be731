"""What the stall monitor has found out about all vCPUs, as sample lines that are kept from scrape to scrape.

Where every vCPU of a host takes notify exits, something new is found out about one VM in ten from scrape to scrape: the
others are not even asked. Those are, each time, of which more is to be told than figures, or some vCPUs of which have
not taken any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from exporter.prometheus.exposition import Family
from exporter.prometheus.grouped_lines import GroupedLines, Rendered
from exporter.prometheus.stall_series import Basis, StallSeries
from exporter.prometheus.vm_series import ShownVm, VmSeries
from exporter.stalls.verdicts import VmFigures
from kvm.model import VmReading

Ask = Callable[[Iterable[ShownVm], Callable[[VmSeries, VmReading], Rendered]], Iterable[tuple[ShownVm, Rendered]]]
"""Asks VMs for their lines, and leaves out those that make no sense."""


class KeptVerdicts:
    """The lines about the vCPUs of all VMs."""

    def __init__(self) -> None:
        self._vms: list[VmSeries] = []
        self._basis: Basis | None = None
        self._settled: list[VmFigures | None] = []
        self._rendered: list[Rendered] = []
        self._lines = GroupedLines()

    def render(self, series: StallSeries, vms: Sequence[ShownVm], ask: Ask) -> list[Family]:
        """Render what is known of the vCPUs of these VMs."""
        asked = [lines for _, lines in vms]
        if asked != self._vms or series.basis != self._basis:
            self._vms, self._basis = asked, series.basis
            self._settled, self._rendered = [None] * len(vms), [[]] * len(vms)
        settled, rendered = series.settle(reading for reading, _ in vms), [*self._rendered]
        news = [at for at, figures in enumerate(settled) if figures is None or figures is not self._settled[at]]
        found = ask([vms[at] for at in news], lambda lines, reading: series.render_vcpus(reading, lines))
        told = {lines: text for (_, lines), text in found}
        for at in news:
            text = told.get(asked[at])
            rendered[at] = [] if text is None else text
            if text is None:
                settled[at] = None  # it is asked again
        families = self._lines.group(rendered)
        self._settled, self._rendered = settled, rendered
        return families
