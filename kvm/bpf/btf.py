"""The types that a kvm module brings along, put where libbpf looks for them. Pure but for ``read_types``.

libbpf places a struct's fields by vmlinux's types, and asks a module only for structs that vmlinux does not know. But
vmlinux knows KVM's structs wherever something that is built in uses them, and a kvm module that was built otherwise (a
vendor's patches, an out-of-tree KVM) has others. So vmlinux's types and the module's are made one here: of KVM's own
structs the module's count, of all others vmlinux's.

The format is Documentation/bpf/btf.rst. A module's BTF goes on where vmlinux's ends, with its type ids and with its
string offsets, so that one after the other they are a whole. Within it a type without a name is found by nobody.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvm.errors import MalformedData

# struct btf_header: magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
_HEADER = struct.Struct("=HBB5I")
_MAGIC = 0xEB9F
# struct btf_type: name_off, info, size or type
_TYPE = struct.Struct("=3I")
_NAME = struct.Struct("=I")
_KIND_STRUCT = 4
# Bytes after struct btf_type by BTF_KIND_*: a fixed number, and a number for each of vlen
_TAILS = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)}
_TAILS |= {17: (4, 0), 19: (0, 12)} | dict.fromkeys((2, 7, 8, 9, 10, 11, 12, 16, 18), (0, 0))
_KVMS_OWN = b"kvm"


class Sections(NamedTuple):
    """The two parts of a BTF."""

    types: bytes
    strings: bytes


def split_sections(data: bytes, origin: str) -> Sections:
    """Take a BTF apart; raises MalformedData."""
    if len(data) < _HEADER.size:
        raise MalformedData(origin, f"{len(data)} bytes are too few for a header")
    magic, version, _, start, types_at, types_length, strings_at, strings_length = _HEADER.unpack_from(data)
    if (magic, version) != (_MAGIC, 1):
        raise MalformedData(origin, f"magic {magic:#x}, version {version}")
    types = data[start + types_at : start + types_at + types_length]
    strings = data[start + strings_at : start + strings_at + strings_length]
    if (len(types), len(strings)) != (types_length, strings_length):
        raise MalformedData(origin, "it is cut off")
    return Sections(types, strings)


def find_structs(types: bytes, origin: str) -> Iterator[tuple[int, int]]:
    """Yield where in the section each struct with a name stands, and the offset of its name; raises MalformedData."""
    at, end, unpack, tails = 0, len(types), _TYPE.unpack_from, _TAILS
    try:
        while at < end:
            name, info, _ = unpack(types, at)
            kind = info >> 24 & 0x1F
            if kind == _KIND_STRUCT and name:
                yield at, name
            fixed, each = tails[kind]
            at += 12 + fixed + each * (info & 0xFFFF)
    except KeyError as err:
        raise MalformedData(origin, f"unknown kind of type {err}") from err
    except struct.error as err:
        raise MalformedData(origin, "its last type is cut off") from err


def merge_types(vmlinux: bytes, module: bytes) -> bytes | None:
    """Make one BTF of vmlinux's and a kvm module's, None where the module has no struct of KVM's that is its own.

    Raises MalformedData.
    """
    base, own = split_sections(vmlinux, "vmlinux's types"), split_sections(module, "the kvm module's types")
    strings = base.strings + own.strings
    own_structs = [(at, read_name(strings, name)) for at, name in find_structs(own.types, "the kvm module's types")]
    kvms = {name for _, name in own_structs if name.startswith(_KVMS_OWN)}
    if not kvms:
        return None
    base_structs = [(at, read_name(strings, name)) for at, name in find_structs(base.types, "vmlinux's types")]
    known = {name for _, name in base_structs} - kvms
    hidden = [at for at, name in base_structs if name in kvms]
    hidden += [len(base.types) + at for at, name in own_structs if name in known]
    types = bytearray(base.types + own.types)
    for at in hidden:
        _NAME.pack_into(types, at, 0)
    header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(strings))
    return header + bytes(types) + strings


def read_name(strings: bytes, at: int) -> bytes:
    """Return the name at this offset; "" where none ends there."""
    end = strings.find(b"\0", at)
    return strings[at:end] if end >= 0 else b""


def read_types(sys: Path) -> bytes | None:
    """Read what libbpf is to take for the kernel's types, None where vmlinux's alone will do.

    Raises OSError or MalformedData. A kvm that is built in, or that describes no types, has no file here.
    """
    directory = sys / "kernel/btf"
    try:
        module = (directory / "kvm").read_bytes()
    except FileNotFoundError:
        return None
    return merge_types((directory / "vmlinux").read_bytes(), module)
