"""Cuts what BPF read of KVM's statistics by VM: rows of numbers in, ``VmStatistics`` out; no I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvm.statistics import StatScope, StatTable, VmStatistics, count_values


class VmPlace(NamedTuple):
    """Where one VM's numbers stand: which row is its, which part of the columns, and how to sort that.

    ``is_whole`` says that all its vCPUs were read, and that it has some.
    """

    row: int
    columns: slice
    sort: Callable[[tuple[int, ...]], tuple[int, ...]] | None
    is_whole: bool


class StatisticCutter:
    """Keeps what it has cut: what has not moved is the same object as before."""

    def __init__(self, table: StatTable) -> None:
        self._table = table
        self._own_values = count_values(table.vm)
        sums = count_values(table.vcpu) if table.level is StatScope.VM else 0
        self._row = struct.Struct(f"={self._own_values + sums}Q")
        self._places: list[VmPlace] = []
        # By VM, as the places are; None before it was cut.
        self._rows: list[tuple[int, ...] | None] = []
        self._made: list[VmStatistics | None] = []
        self._cut_from: tuple[object, object] | None = None

    def place(self, places: Sequence[VmPlace], made: Sequence[VmStatistics | None]) -> None:
        """Take in where VMs are from now on, and what was last made of each."""
        self._places, self._made = list(places), list(made)
        self._rows, self._cut_from = [None] * len(places), None

    def cut(self, rows: bytes, columns: Sequence[tuple[int, ...]]) -> list[VmStatistics | None]:
        """Return the statistics of each VM, None where none were read of it."""
        cut_from = (rows, columns)
        if cut_from != self._cut_from:
            self._cut_from = cut_from
            all_rows = list(self._row.iter_unpack(rows)) if self._row.size else []
            now = [all_rows[place.row] if place.row < len(all_rows) else None for place in self._places]
            self._made = self._split(now) if self._table.level is StatScope.VM else self._take(now, columns)
            self._rows = now
        return self._made

    def _split(self, rows: Sequence[tuple[int, ...] | None]) -> list[VmStatistics | None]:
        """Tell each VM's own values from the sums over its vCPUs, which are none where one was not read."""
        made: list[VmStatistics | None] = []
        for place, row, then, before in zip(self._places, rows, self._rows, self._made, strict=True):
            if row == then or row is None:
                made.append(before if row is not None else None)
                continue
            own, sums = row[: self._own_values], row[self._own_values :]
            now = VmStatistics(self._table, own or None, sums if sums and place.is_whole else None)
            made.append(before if now == before else now)
        return made

    def _take(
        self, rows: Sequence[tuple[int, ...] | None], columns: Sequence[tuple[int, ...]]
    ) -> list[VmStatistics | None]:
        """Take each VM's part of the columns."""
        read = len(columns[0]) if columns else 0
        made: list[VmStatistics | None] = []
        for (_, part, sort, _), row, before in zip(self._places, rows, self._made, strict=True):
            of_vcpus: tuple[tuple[int, ...], ...] | None = None
            if columns and part.stop <= read:
                of_vcpus = tuple([column[part] if sort is None else sort(column[part]) for column in columns])
            now = VmStatistics(self._table, row or None, None, of_vcpus) if row or of_vcpus else None
            made.append(before if now == before else now)
        return made
