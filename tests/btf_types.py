"""Types in BTF for tests: small ones made from nothing, and real ones of which a struct's fields are moved.

The format is Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvm.bpf.btf import Sections, find_structs, read_name, split_sections

HEADER = struct.Struct("=HBB5I")
KIND_INT, KIND_STRUCT = 1, 4


def pack_btf(types: bytes, strings: bytes) -> bytes:
    """A whole BTF of its two sections."""
    return HEADER.pack(0xEB9F, 1, 0, HEADER.size, 0, len(types), len(types), len(strings)) + types + strings


def pack_struct(name: int, size: int, members: Sequence[tuple[int, int, int]] = ()) -> bytes:
    """A struct: offset of its name, its size, and name, type and place in bits of each member."""
    record = struct.pack("=3I", name, KIND_STRUCT << 24 | len(members), size)
    return record + b"".join(struct.pack("=3I", *member) for member in members)


def find_struct(sections: Sections, name: bytes) -> int:
    """Where a struct of this name stands in the section of types."""
    (at,) = (at for at, found in find_structs(sections.types, "test") if read_name(sections.strings, found) == name)
    return at


def cut_struct(sections: Sections, name: bytes) -> bytearray:
    """The record of a struct."""
    at = find_struct(sections, name)
    count = struct.unpack_from("=I", sections.types, at + 4)[0] & 0xFFFF
    return bytearray(sections.types[at : at + 12 + 12 * count])


def move_members(sections: Sections, record: bytearray, first: bytes, by: int) -> None:
    """Move a member of a struct's record, and all behind it, by so many bytes, as a new member before it would."""
    moving = False
    for at in range(12, len(record), 12):
        name, type_, place = struct.unpack_from("=3I", record, at)
        moving = moving or read_name(sections.strings, name) == first
        # In a struct with bit fields the upper eight bits are a member's width, which this leaves alone.
        struct.pack_into("=3I", record, at, name, type_, place + 8 * by if moving else place)
    assert moving, f"there is no member {first!r}"


def move_in_module(vmlinux: bytes, name: bytes, first: bytes, by: int) -> bytes:
    """The BTF of a module that has this struct as vmlinux does, but for members that have moved."""
    sections = split_sections(vmlinux, "test")
    record = cut_struct(sections, name)
    move_members(sections, record, first, by)
    return pack_btf(bytes(record), b"")


def move_in_vmlinux(vmlinux: bytes, name: bytes, first: bytes, by: int) -> bytes:
    """vmlinux's BTF as it is but for members of a struct that have moved."""
    sections = split_sections(vmlinux, "test")
    at, record = find_struct(sections, name), cut_struct(sections, name)
    move_members(sections, record, first, by)
    types = sections.types[:at] + record + sections.types[at + len(record) :]
    return pack_btf(types, sections.strings)


def make_other_struct(vmlinux: bytes) -> bytes:
    """The BTF of a module with one struct of KVM's, which none of our programs asks for."""
    return pack_btf(pack_struct(len(split_sections(vmlinux, "test").strings), 8), b"kvm_of_no_interest\0")
