"""Understands what a tracepoint says about its own records: the file ``events/*/*/format`` of tracefs.

The layout of a record changes with the kernel (kvm:kvm_exit gained ``requests`` in Linux 6.14), so no offset is
remembered here: Documentation/trace/events.rst, section 2, describes the file. Pure; `kvm.tracefs` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvm.errors import MalformedData

_NAME = re.compile(r"^name: (\S+)$", re.MULTILINE)
_ID = re.compile(r"^ID: (\d+)$", re.MULTILINE)
_FIELD = re.compile(r"^\s*field:([^;]+);\s*offset:(\d+);\s*size:(\d+);(?:\s*signed:([01]);)?", re.MULTILINE)
_FIELD_NAME = re.compile(r"(\w+)\s*(?:\[[^]]*\])?\s*$")
# A record stands in a buffer of one page (PERF_MAX_TRACE_SIZE of include/linux/trace_events.h is less than that).
_LARGEST_RECORD = 65536


class Field(NamedTuple):
    """Where one field of a record stands, in bytes, and whether its number has a sign."""

    offset: int
    size: int
    signed: bool


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """One tracepoint of the kernel that runs: its number, and what its records look like."""

    name: str
    id: int
    fields: Mapping[str, Field]

    @property
    def size(self) -> int:
        """How many bytes the known fields of a record take."""
        return max(field.offset + field.size for field in self.fields.values())

    def find_missing(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``names`` that no field of the record has, or none that is a whole number."""
        numbers = {name for name, field in self.fields.items() if field.size in (1, 2, 4, 8)}
        return tuple(name for name in names if name not in numbers)

    def decode(self, record: bytes, names: Iterable[str]) -> tuple[int, ...]:
        """Return the numbers in these fields of a record, in this order; raises MalformedData where it is too short."""
        values = []
        for name in names:
            offset, size, signed = self.fields[name]
            part = record[offset : offset + size]
            if len(part) != size:
                raise MalformedData(self.name, f"a record of {len(record)} bytes has no {name} at {offset}")
            values.append(int.from_bytes(part, "little", signed=signed))
        return tuple(values)


def parse_format(text: str, origin: str) -> Tracepoint:
    """Understand a ``format`` file; ``origin`` names it in MalformedData, which is raised where it makes no sense.

    Fields of unknown names and types, in any order, are as good as the known ones; what follows them (``print fmt``)
    is for other programs.
    """
    name, number = _NAME.search(text), _ID.search(text)
    if name is None or number is None:
        raise MalformedData(origin, "a tracepoint's format has no name or no ID")
    fields: dict[str, Field] = {}
    for declaration, offset, size, signed in _FIELD.findall(text):
        field = Field(int(offset), int(size), signed == "1")
        field_name = _FIELD_NAME.search(declaration)
        if field_name is None or field.offset + field.size > _LARGEST_RECORD:
            raise MalformedData(origin, f"a field makes no sense: {declaration.strip()!r} at {offset}, size {size}")
        if field_name[1] in fields:
            raise MalformedData(origin, f"two fields are called {field_name[1]}")
        fields[field_name[1]] = field
    if not fields:
        raise MalformedData(origin, "a tracepoint's format names no fields")
    return Tracepoint(name[1], int(number[1]), fields)
