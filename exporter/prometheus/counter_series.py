"""Sample lines of all VMs that have a number a vCPU: metric by metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Column, CounterLines, Family
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vm_series import VCPU_COUNTERS, ShownVm, VmSeries


class CounterSeries:
    """Renders columns of numbers, and keeps their lines from scrape to scrape."""

    def __init__(self) -> None:
        self._lines: defaultdict[Metric, CounterLines] = defaultdict(CounterLines)
        self._whole: tuple[list[VmSeries], list[int]] = ([], [])
        """The VMs, and how many vCPUs each has, if the last scrape told every counter of every vCPU."""
        self._summed: list[VmSeries] = []
        """The VMs, if the last scrape that told sums told one of each."""

    def render(self, vms: Iterable[Iterable[Column]]) -> list[Family]:
        """Render the columns of all VMs."""
        templates: defaultdict[Metric, list[bytes]] = defaultdict(list)
        columns: defaultdict[Metric, list[tuple[float, ...]]] = defaultdict(list)
        for taken in vms:
            for metric, template, column in taken:
                templates[metric].append(template)
                columns[metric].append(column)
        return [Family(metric, self._lines[metric].render(templates[metric], columns[metric])) for metric in templates]

    def refill(self, metric: Metric, columns: Sequence[tuple[float, ...]]) -> Family:
        """Render a metric that was rendered the last time, with other numbers for the same VMs."""
        return Family(metric, self._lines[metric].refill(columns))

    def render_sums(self, found: Sequence[tuple[ShownVm, Column | None]]) -> list[Family]:
        """Render the VMs' sums, where they are known."""
        taken = [column for _, column in found if column is not None]
        template = b"".join(template for _, template, _ in taken)
        known = tuple(chain.from_iterable(column for _, _, column in taken))
        self._summed = []  # what follows may fail half way
        # One column for all: with a column for each VM, each would be printed by itself.
        families = self.render([[(metrics.VM_NOTIFY_WINDOW_EXITS, template, known)]] if taken else [])
        self._summed = [lines for (_, lines), _ in found] if len(taken) == len(found) else []
        return families

    def render_sums_as_before(self, shown: Sequence[ShownVm], sums: Sequence[int | None] = ()) -> list[Family]:
        """Render the VMs' sums where all are known, and were in the scrape before; [] elsewhere.

        ``sums`` are those of all VMs, if somebody has made them.
        """
        if not self._summed or [lines for _, lines in shown] != self._summed:
            return []
        if len(sums) != len(shown):
            sums = [reading.notify_exits for reading, _ in shown]
        known = tuple([total for total in sums if total is not None])
        return [self.refill(metrics.VM_NOTIFY_WINDOW_EXITS, [known])] if len(known) == len(sums) else []

    def render_vcpus(self, found: Sequence[tuple[ShownVm, list[Column]]], *, is_all: bool) -> list[Family]:
        """Render what was taken of the VMs' vCPUs; ``is_all`` says that no VM and no vCPU was left out."""
        self._whole = [], []  # what follows may fail half way
        families = self.render(taken for _, taken in found)
        is_whole = is_all and all(len(taken) == len(VCPU_COUNTERS) for _, taken in found)
        vms = [vm for vm, _ in found] if is_whole else []
        self._whole = [lines for _, lines in vms], [len(reading.vcpus) for reading, _ in vms]
        return families

    def render_as_before(self, shown: Sequence[ShownVm]) -> list[Family]:
        """Render every counter of every vCPU where the scrape before did, of the same VMs; [] elsewhere.

        To ask VM by VM for its columns takes four times as long.
        """
        series, lengths = self._whole
        if not series or [lines for _, lines in shown] != series:
            return []
        numbers = [reading.counters.per_vcpu for reading, _ in shown]
        families = []
        for statistic, metric in VCPU_COUNTERS:
            columns = [of_vm.get(statistic, ()) for of_vm in numbers]
            if [*map(len, columns)] != lengths:
                return []
            families.append(self.refill(metric, columns))
        return families
