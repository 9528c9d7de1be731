"""What metrics tell of the tracked vCPUs of one VM, column by column.

It is written when something has changed, in the event loop, which has just looked at that vCPU. A scrape takes whole
columns: to ask one vCPU of ten thousand, which lie all over the memory, takes it 5 us.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from exporter.stalls.verdicts import VcpuFigures, VmFigures, find_stuck


class FigureColumns:
    """The figures of each tracked vCPU, in the order of their vcpu_ids; not thread-safe."""

    def __init__(self) -> None:
        # One for each field of VmFigures but the last, and which of them have changed since they were found last.
        self._columns: list[list[Any]] = [[] for _ in VmFigures._fields[:-1]]
        self._changed: set[int] = set()
        self._found: list[Any] = [*VmFigures()]

    def put(self, vcpu_id: int, figures: VcpuFigures) -> None:
        """Take in what is to be told of a vCPU from now on."""
        at, is_there = self._find(vcpu_id)
        if not is_there:
            for column in self._columns:
                column.insert(at, None)
            self._changed.update(range(len(self._columns)))
        for number, value in enumerate((vcpu_id, *figures, find_stuck(figures.state, figures.can_judge))):
            if self._columns[number][at] != value:
                self._columns[number][at] = value
                self._changed.add(number)

    def drop(self, vcpu_id: int) -> None:
        """Tell of a vCPU no more."""
        at, is_there = self._find(vcpu_id)
        if is_there:
            for column in self._columns:
                del column[at]
            self._changed.update(range(len(self._columns)))

    def find(self) -> VmFigures:
        """Return the figures of now; a column of which nothing has changed is the same object as before."""
        if self._changed:
            for number in self._changed:
                self._found[number] = tuple(self._columns[number])
            self._found[-1] = self._found[-2].count(1)
            self._changed.clear()
        return VmFigures._make(self._found)

    def _find(self, vcpu_id: int) -> tuple[int, bool]:
        vcpu_ids = self._columns[0]
        at = bisect_left(vcpu_ids, vcpu_id)
        return at, vcpu_ids[at : at + 1] == [vcpu_id]


def build_vm_figures(vcpus: Mapping[int, VcpuFigures]) -> VmFigures:
    """Build a VM's figures from those of its vCPUs, by vcpu_id."""
    columns = FigureColumns()
    for vcpu_id, figures in vcpus.items():
        columns.put(vcpu_id, figures)
    return columns.find()
