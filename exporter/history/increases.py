"""What moved between two snapshots: the agent's own memory of the notify counters.

A VM's counter dies with the VM, and an idle one says nothing about when it last moved. ``IncreaseTracker`` keeps both:
the sum of all increases seen, which only grows, and the time of the last one of each vCPU.

What counts as an increase is chosen so that the sum is never too high:

- what a counter shows in the first snapshot of a VM that was there before the agent is history, not an increase;
- a VM whose process started after the agent's first snapshot counts from 0, and so does a vCPU plugged into a VM of
  which every vCPU had been read, unless it may be in a sum that was seen before;
- a counter that falls was reset (debugfs clear, a vCPU unplugged and plugged again): its new value is the increase;
- when a VM changes between per-vCPU numbers and a sum, the two are compared as sums, where both cover all vCPUs, and
  only what goes beyond the highest sum so far is an increase;
- a VM that is missing from a snapshot keeps its place for ``MEMORY_SECONDS``, because its process may come back into
  sight, unless more than ``MAX_MISSING`` are missing; what is forgotten after that never counts from 0 again. A vCPU
  keeps its place as long as its VM: QEMU parks an unplugged one and plugs the same one in again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import gt
from types import MappingProxyType
from typing import Final

from exporter.history.changes import find_notify_counters
from kvm.model import NOTIFY_WINDOW_EXITS, Snapshot, VmKey, VmReading

MEMORY_SECONDS: Final = 600.0
# So many VMs that are missing are remembered: whoever makes and ends them by the thousand makes us forget sooner.
MAX_MISSING: Final = 5000


@dataclass(slots=True)
class _Memory:
    """What is remembered of one VM.

    ``column`` are the latest numbers, in the order of ``vcpu_ids``, and ``values`` older ones by vcpu_id, also of vCPUs
    that are away; ``total`` is the latest sum, where there is one instead. ``accounted`` is what of the VM's notify
    exits is in one of our sums or known as history; ``complete`` whether that holds for all of them. A vCPU that is
    seen for the first time counts ``from_zero``, unless the VM has been ``summed``: then it may be in a sum already.
    ``moved_at_once`` is when all of ``vcpu_ids`` moved, where that is newer than ``last_moves``.
    """

    from_zero: bool
    start_time_seconds: float | None
    last_seen_seconds: float = 0.0
    vcpu_ids: tuple[int, ...] = ()
    column: tuple[int, ...] = ()
    values: dict[int, int] = field(default_factory=dict)
    total: int | None = None
    accounted: int = 0
    complete: bool = False
    summed: bool = False
    last_moves: dict[int, float] = field(default_factory=dict)
    moved_at_once: float | None = None


class IncreaseTracker:
    """Tracks the notify counters from snapshot to snapshot; used by one thread."""

    def __init__(self, first_total: int = 0) -> None:
        """``first_total`` is what an agent before this one has counted."""
        self._memories: dict[VmKey, _Memory] = {}
        self._present: list[_Memory] = []  # of the VMs of the newest snapshot
        self.moved_vms: set[VmKey] = set()
        """The VMs of which ``last_moves`` has something to tell: few of a host's."""
        self.all_moved_at: float | None = None
        """``moved_at_once`` of the newest snapshot's readings where it is the same of all, else None."""
        self.sums: list[int] = []
        """The notify exits of each VM of the newest snapshot, if all of their vCPUs have just moved; else empty."""
        self._composition: object = None
        self._columns: list[tuple[int, ...]] = []
        """The numbers of ``_present``, where each VM has one of every vCPU; else empty."""
        self._grown_at: float | None = None
        """Since when these are newer than what the memories have; None where they are not."""
        self._zero_after_unix_seconds = math.inf
        self.increases_total = first_total
        self.readable = False
        """Whether anything could be counted so far: else ``increases_total`` would be a claim and no fact."""

    def observe(self, snapshot: Snapshot) -> None:
        """Take in a snapshot."""
        if self._zero_after_unix_seconds == math.inf:
            self._zero_after_unix_seconds = snapshot.unix_seconds
        columns = [column for column in find_notify_counters(snapshot)[0] if column]
        if snapshot.composition is self._composition and self._take_growth(snapshot, columns):
            self.observe_same(snapshot)
            return
        self._tell_memories()
        self._composition, self._columns, self.sums = None, [], []  # what follows may fail half way
        self.readable = self.readable or _can_count(snapshot)
        present = []
        for reading in snapshot.readings:
            memory = self._memories.get(reading.vm.key)
            if memory is None:
                started = reading.vm.start_time_seconds
                from_zero = started is not None and started > self._zero_after_unix_seconds
                memory = self._memories[reading.vm.key] = _Memory(from_zero, started)
            present.append(memory)
            self._observe_vm(memory, reading, snapshot.unix_seconds)
            if memory.last_moves or memory.moved_at_once is not None:
                self.moved_vms.add(reading.vm.key)
        self._present = present
        self.all_moved_at = self._find_all_moved(snapshot)
        self.observe_same(snapshot)
        is_whole = all(memory.complete and memory.total is None for memory in present)
        if is_whole and columns == [memory.column for memory in present]:
            self._composition, self._columns = snapshot.composition, columns

    def _take_growth(self, snapshot: Snapshot, columns: list[tuple[int, ...]]) -> bool:
        """Take in that every vCPU of the host has taken notify exits, as after a bad microcode update, and say so.

        To tell the memories of 625 VMs takes half as long again: they are told when somebody asks, or when some vCPU
        has not moved.
        """
        if [*map(len, columns)] != [*map(len, self._columns)]:
            return False
        if not columns or not all(map(gt, chain.from_iterable(columns), chain.from_iterable(self._columns))):
            return False
        sums = [*map(sum, columns)]
        total = self.increases_total + sum(sums) - sum(self.sums or map(sum, self._columns))
        self.moved_vms.update(reading.vm.key for reading in snapshot.readings)
        self._columns, self.sums, self.increases_total = columns, sums, total
        self._grown_at = self.all_moved_at = snapshot.unix_seconds
        return True

    def _tell_memories(self) -> None:
        """Tell each VM's memory of what has grown."""
        if self._grown_at is not None:
            for memory, column in zip(self._present, self._columns, strict=True):
                memory.accounted += sum(column) - sum(memory.column)
                memory.column, memory.moved_at_once = column, self._grown_at
            self._grown_at = None

    def observe_same(self, snapshot: Snapshot) -> None:
        """Take in a snapshot of the same VMs and vCPUs as the one before, of which no notify counter has moved."""
        for memory in self._present:
            memory.last_seen_seconds = snapshot.monotonic_seconds
        self._forget_missing(snapshot.monotonic_seconds)

    def last_moves(self, key: VmKey) -> Mapping[int, float]:
        """Return when each vCPU of a VM, by vcpu_id, was last seen to move (Unix time); never seen is absent."""
        self._tell_memories()
        memory = self._memories.get(key)
        if memory is not None:
            _date_moves(memory)
        return MappingProxyType(memory.last_moves if memory else {})

    def moved_at_once(self, reading: VmReading) -> float | None:
        """Return when all vCPUs of a reading were last seen to move (Unix time), if none has alone since; else None."""
        self._tell_memories()
        memory = self._memories.get(reading.vm.key)
        is_of_all = memory is not None and memory.vcpu_ids == reading.counters.vcpu_ids
        return memory.moved_at_once if memory is not None and is_of_all else None

    def _find_all_moved(self, snapshot: Snapshot) -> float | None:
        times = {memory.moved_at_once for memory in self._present}
        vcpu_ids = [memory.vcpu_ids for memory in self._present]
        is_of_all = len(times) == 1 and vcpu_ids == [reading.counters.vcpu_ids for reading in snapshot.readings]
        return times.pop() if is_of_all else None

    def _forget_missing(self, now: float) -> None:
        """Forget VMs that have been missing for long; of too many those first that never took an exit."""
        missing = [key for key, memory in self._memories.items() if memory.last_seen_seconds < now]
        too_many = max(0, len(missing) - MAX_MISSING)
        if too_many:
            missing.sort(key=self._rank)
        forgotten, kept, oldest_seconds = missing[:too_many], missing[too_many:], now - MEMORY_SECONDS
        forgotten += [key for key in kept if self._memories[key].last_seen_seconds < oldest_seconds]
        for key in forgotten:
            memory = self._memories.pop(key)
            self.moved_vms.discard(key)
            # Should this VM come back, it must not count from 0 a second time.
            if memory.start_time_seconds is not None:
                self._zero_after_unix_seconds = max(self._zero_after_unix_seconds, memory.start_time_seconds)

    def _rank(self, key: VmKey) -> tuple[bool, float]:
        memory = self._memories[key]
        return memory.accounted > 0, memory.last_seen_seconds

    def _observe_vm(self, memory: _Memory, reading: VmReading, now: float) -> None:
        counters = reading.counters
        column = counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
        if column is not None and len(column) == len(counters.vcpu_ids):
            complete = len(column) == reading.vcpu_count
            if counters.vcpu_ids is memory.vcpu_ids and complete is memory.complete and memory.total is None:
                self._observe_same_vcpus(memory, column, now)
            elif (column, counters.vcpu_ids, complete) != (memory.column, memory.vcpu_ids, memory.complete):
                self._observe_vcpus(memory, dict(zip(counters.vcpu_ids, column, strict=True)), complete, now)
                memory.vcpu_ids, memory.column = counters.vcpu_ids, column
        elif NOTIFY_WINDOW_EXITS in counters.totals:
            self._observe_sum(memory, counters.totals[NOTIFY_WINDOW_EXITS])

    def _observe_same_vcpus(self, memory: _Memory, column: tuple[int, ...], now: float) -> None:
        """Take in numbers of the vCPUs that were there the last time: nearly always so, and no number has moved."""
        if column == memory.column:
            return
        if all(map(gt, column, memory.column)):  # as where every vCPU of a host takes notify exits
            self._count(memory, sum(column) - sum(memory.column))
            memory.moved_at_once = now
        else:
            _date_moves(memory)
            for vcpu_id, before, value in zip(memory.vcpu_ids, memory.column, column, strict=True):
                increase = value - before if value >= before else value
                if increase:
                    self._count(memory, increase)
                    memory.last_moves[vcpu_id] = now
        memory.column = column

    def _observe_vcpus(self, memory: _Memory, values: dict[int, int], complete: bool, now: float) -> None:
        memory.values.update(zip(memory.vcpu_ids, memory.column, strict=True))
        _date_moves(memory)
        if memory.total is not None:
            if complete:
                self._count_beyond_accounted(memory, sum(values.values()))
        else:
            for vcpu_id, value in values.items():
                before = memory.values.get(vcpu_id)
                if before is None:
                    before = self._place_new_vcpu(memory, value)
                increase = value - before if value >= before else value
                if increase:
                    self._count(memory, increase)
                    memory.last_moves[vcpu_id] = now
        memory.values |= values
        memory.total, memory.complete = None, complete
        # A vCPU that is not among all the vCPUs there are will be a new one.
        memory.from_zero = memory.from_zero or complete

    def _place_new_vcpu(self, memory: _Memory, value: int) -> int:
        """Return from which value on a vCPU counts that is seen for the first time; what is below is history."""
        if memory.from_zero and not memory.summed:
            return 0
        memory.accounted += value
        return value

    def _observe_sum(self, memory: _Memory, total: int) -> None:
        if memory.total is not None:
            self._count(memory, total - memory.total if total >= memory.total else total)
        elif memory.complete or (memory.from_zero and not memory.values):
            self._count_beyond_accounted(memory, total)
        memory.accounted = max(memory.accounted, total)
        _date_moves(memory)
        memory.vcpu_ids, memory.column, memory.values = (), (), {}
        memory.total, memory.complete = total, True
        memory.summed = True

    def _count_beyond_accounted(self, memory: _Memory, total: int) -> None:
        self._count(memory, max(0, total - memory.accounted))

    def _count(self, memory: _Memory, increase: int) -> None:
        self.increases_total += increase
        memory.accounted += increase


def _date_moves(memory: _Memory) -> None:
    """Have ``last_moves`` tell all that is known."""
    if memory.moved_at_once is not None:
        memory.last_moves |= dict.fromkeys(memory.vcpu_ids, memory.moved_at_once)
        memory.moved_at_once = None


def _can_count(snapshot: Snapshot) -> bool:
    """Tell whether a snapshot has read some VM, or has found, with a source that works, that there is none."""
    if snapshot.readings or not snapshot.complete:
        return any(reading.source for reading in snapshot.readings)
    return any(report.up for report in snapshot.sources)
