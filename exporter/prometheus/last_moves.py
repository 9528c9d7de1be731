"""When each vCPU was last seen to take a notify exit, as sample lines.

After a bad microcode update every vCPU of a VM moves from snapshot to snapshot. Their series are named once then, those
of all such VMs are joined, and only the time is put in anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from exporter.history.increases import IncreaseTracker
from exporter.prometheus import metrics
from exporter.prometheus.exposition import Family, render_same
from exporter.prometheus.shown_vms import AskVms
from exporter.prometheus.vm_series import ShownVm, VmSeries
from kvm.model import VmReading


class LastMoves:
    """Renders what an IncreaseTracker remembers, and keeps lines from scrape to scrape."""

    def __init__(self, increases: IncreaseTracker) -> None:
        self._increases = increases
        self._lines: tuple[Mapping[float, list[bytes]], list[bytes]] = ({}, [])
        self._joined: dict[bytes, tuple[list[bytes], bytes]] = {}
        """Series of the scrape before that had one time, as they were named and joined, by the first of them."""

    def render(self, vms: Sequence[ShownVm], ask: AskVms) -> Family:
        """Render the times of the vCPUs of these VMs that have moved at all."""
        time, names = self._increases.all_moved_at, [lines.moves_series for _, lines in vms]
        if time is not None and names and all(names):  # to ask VM by VM takes twice as long
            return Family(metrics.VCPU_LAST_NOTIFY_EXIT, self._render_at_once({time: names}))
        at_once: defaultdict[float, list[bytes]] = defaultdict(list)
        others = []
        for reading, lines in vms:
            time = self._increases.moved_at_once(reading)
            if time is not None and lines.moves_series:
                at_once[time].append(lines.moves_series)
            elif reading.vm.key in self._increases.moved_vms:
                others.append((reading, lines))
        texts = [text for _, of_vm in ask(others, self._render_vm) for text in of_vm]
        return Family(metrics.VCPU_LAST_NOTIFY_EXIT, texts + self._render_at_once(at_once))

    def _render_vm(self, lines: VmSeries, reading: VmReading) -> list[bytes]:
        time = self._increases.moved_at_once(reading)
        if time is None:
            return lines.render_last_moves(self._increases.last_moves(reading.vm.key))
        return [render_same(lines.name_moves(), time)]

    def _render_at_once(self, series: Mapping[float, list[bytes]]) -> list[bytes]:
        before, lines = self._lines
        if series != before:
            joined = [self._join(names) for names in series.values()]
            self._joined = {names[0]: (names, text) for names, text in zip(series.values(), joined, strict=True)}
            lines = [*map(render_same, joined, series)]
            self._lines = series, lines
        return lines

    def _join(self, names: list[bytes]) -> bytes:
        known, joined = self._joined.get(names[0], ([], b""))
        return joined if known == names else b"".join(names)
