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
        self._lines = GroupedLines(0)

    def render(self, series: StallSeries, vms: Sequence[ShownVm], ask: Ask) -> list[Family]:
        """Render what is known of the vCPUs of these VMs."""
        asked = [lines for _, lines in vms]
        if asked != self._vms or series.basis != self._basis:
            self._vms, self._basis = asked, series.basis
            self._settled, self._lines = [None] * len(vms), GroupedLines(len(vms))
        settled = series.settle(reading for reading, _ in vms)
        news = [at for at, figures in enumerate(settled) if figures is None or figures is not self._settled[at]]
        for at in news:
            self._settled[at] = None  # what follows may fail half way
        found = ask([vms[at] for at in news], lambda lines, reading: series.render_vcpus(reading, lines))
        told = {lines: rendered for (_, lines), rendered in found}
        for at in news:
            rendered = told.get(asked[at])
            self._lines.put(at, {} if rendered is None else rendered)
            self._settled[at] = None if rendered is None else settled[at]
        return self._lines.list_families()
