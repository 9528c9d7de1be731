"""Where the wanted values stand in a statistics file: pure."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from kvm import binary_stats
from kvm.errors import MalformedData
from kvm.statistic_plan import plan_statistics
from kvm.statistics import StatScope, StatSelection, StatTable

Pick = Callable[[bytes], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Where the wanted values stand: in the first ``length`` bytes of a statistics file.

    The counters ``names`` are unpacked by ``values``; ``pick`` takes out what ``table`` describes besides. All that a
    file has is ``described``; its values begin at ``data_offset`` and end at ``whole_length``.
    """

    names: tuple[str, ...]
    length: int
    values: struct.Struct
    table: StatTable | None = None
    pick: Pick = lambda _block: ()
    described: Mapping[str, binary_stats.Statistic] = field(default_factory=dict)
    data_offset: int = 0

    @property
    def whole_length(self) -> int:
        """How many bytes a file with all that is described has, at least."""
        return self.data_offset + binary_stats.measure_values(self.described.values())


def plan_layout(header: binary_stats.StatsHeader, offsets: Mapping[str, int]) -> FileLayout:
    """Plan one read for counters at these offsets in bytes within the data block."""
    names = tuple(sorted(offsets, key=lambda name: offsets[name]))
    format_, at = "=", -header.data_offset
    for name in names:
        format_ += f"{offsets[name] - at}xQ"
        at = offsets[name] + binary_stats.VALUE_BYTES
    return FileLayout(names, header.data_offset + at, struct.Struct(format_))


def plan_picks(header: binary_stats.StatsHeader, words: Sequence[int]) -> tuple[int, Pick]:
    """Plan how to take these 64-bit words out of the data block; returns how long a file has to be for that."""
    if not words:
        return 0, lambda _block: ()
    length = max(words) + 1
    block, at = struct.Struct(f"={length}Q"), header.data_offset
    if len(words) == 1:
        (only,) = words
        return at + block.size, lambda file: (block.unpack_from(file, at)[only],)
    choose = itemgetter(*words)
    return at + block.size, lambda file: choose(block.unpack_from(file, at))


def decode_layout(
    header: binary_stats.StatsHeader,
    block: bytes,
    scope: StatScope,
    wanted: Sequence[str],
    *,
    selection: StatSelection | None,
    origin: str,
) -> FileLayout:
    """Plan the read from a file's descriptors; raises MalformedData, also where counters are wanted and none is there.

    ``scope`` says whose file it is.
    """
    statistics = binary_stats.decode_descriptors(header, block, origin)
    offsets = binary_stats.find_counters(statistics, wanted)
    if wanted and not offsets:
        raise MalformedData(origin, "this kernel describes none of the wanted statistics")
    layout = plan_layout(header, offsets) if offsets else FileLayout((), 0, struct.Struct("="))
    layout = replace(layout, described=statistics, data_offset=header.data_offset)
    if selection is None:
        return layout
    of_vm, of_vcpu = (statistics, {}) if scope is StatScope.VM else ({}, statistics)
    plan = plan_statistics(selection, of_vm, of_vcpu, binary_stats.MAX_DATA_BYTES)
    length, pick = plan_picks(header, plan.vm_words + plan.vcpu_words)
    return replace(layout, length=max(layout.length, length), table=plan.table, pick=pick)


def join_tables(vm: StatTable | None, vcpu: StatTable) -> StatTable:
    """Make one table of what two files describe."""
    if vm is None:
        return vcpu
    return StatTable(vcpu.level, vm.vm, vcpu.vcpu, vm.left_out + vcpu.left_out)
