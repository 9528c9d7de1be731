"""Understands KVM's binary statistics: blocks of bytes in, descriptors and numbers out; no I/O.

The kernel describes its statistics itself (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD); nothing about
their names, number or places is remembered here, because vendors' kernels and later ones differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvm import abi
from kvm.errors import MalformedData

# Far above what any kernel has (47 descriptors of 64 bytes, 1,120 bytes of data in Linux 6.18): bounds what a forged
# or broken header can make us read.
MAX_DESCRIPTORS = 4096
MAX_NAME_BYTES = 1024
MAX_DATA_BYTES = 1 << 20
VALUE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic as the kernel describes it (struct kvm_stats_desc, include/uapi/linux/kvm.h).

    ``offset`` counts bytes from the start of the data block, ``size`` the 64-bit values, ``exponent`` and the bits of
    ``flags`` give type, unit and base.
    """

    name: str
    flags: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


@dataclass(frozen=True, slots=True)
class StatsHeader:
    """struct kvm_stats_header: where the blocks of a statistics file stand, in bytes."""

    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int

    @property
    def desc_bytes(self) -> int:
        """The length of the descriptor block."""
        return self.num_desc * (abi.KVM_STATS_DESC.size + self.name_size)


def decode_header(block: bytes, origin: str) -> StatsHeader:
    """Decode the first 24 bytes of a statistics file; raises MalformedData if short or absurd."""
    if len(block) < abi.KVM_STATS_HEADER.size:
        raise MalformedData(origin, f"header of {len(block)} bytes, {abi.KVM_STATS_HEADER.size} expected")
    header = StatsHeader(*abi.KVM_STATS_HEADER.unpack_from(block))
    far = max(header.id_offset, header.desc_offset, header.data_offset) > MAX_DATA_BYTES
    if not 0 < header.name_size <= MAX_NAME_BYTES or header.num_desc > MAX_DESCRIPTORS or far:
        raise MalformedData(origin, f"absurd header: {header}")
    return header


def decode_descriptors(header: StatsHeader, block: bytes, origin: str) -> dict[str, Statistic]:
    """Decode the descriptor block (``header.desc_bytes`` bytes) into statistics by name.

    A descriptor may be longer than we know (its name is). Raises MalformedData if the block is short, a name is empty
    or given twice, or a value would lie outside any sensible data block.
    """
    if len(block) < header.desc_bytes:
        raise MalformedData(origin, f"descriptors of {len(block)} bytes, {header.desc_bytes} expected")
    stride = abi.KVM_STATS_DESC.size + header.name_size
    statistics: dict[str, Statistic] = {}
    for at in range(0, header.desc_bytes, stride):
        flags, exponent, size, offset, bucket_size = abi.KVM_STATS_DESC.unpack_from(block, at)
        raw_name = block[at + abi.KVM_STATS_DESC.size : at + stride].split(b"\0", 1)[0]
        name = raw_name.decode("ascii", "replace")
        if not name or name in statistics:
            raise MalformedData(origin, f"statistic without a name of its own at byte {at}: {name!r}")
        if offset + size * VALUE_BYTES > MAX_DATA_BYTES:
            raise MalformedData(origin, f"statistic {name} lies at byte {offset}, size {size}")
        statistics[name] = Statistic(name, flags, exponent, size, offset, bucket_size)
    return statistics


def measure_values(statistics: Iterable[Statistic]) -> int:
    """Return how many bytes the values of these statistics take, from where all values begin."""
    return max((found.offset + found.size * VALUE_BYTES for found in statistics), default=0)


def decode_values(statistics: Mapping[str, Statistic], values: bytes) -> dict[str, tuple[int, ...]]:
    """Decode the values of statistics by name; those that a shorter block does not reach are left out."""
    return {
        name: struct.unpack_from(f"={found.size}Q", values, found.offset)
        for name, found in statistics.items()
        if measure_values((found,)) <= len(values)
    }


def is_counter(statistic: Statistic) -> bool:
    """Tell whether it is one cumulative number."""
    return (
        statistic.size == 1 and statistic.flags & abi.KVM_STATS_TYPE_MASK == abi.KvmStatsType.KVM_STATS_TYPE_CUMULATIVE
    )


def find_counters(statistics: dict[str, Statistic], names: Iterable[str]) -> dict[str, int]:
    """Return the offsets in bytes, within the data block, of those of these counters that the kernel has."""
    return {name: statistics[name].offset for name in names if name in statistics and is_counter(statistics[name])}
