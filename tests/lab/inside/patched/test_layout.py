"""Nothing that BPF programs read has moved: the patched modules' types beside those that vmlinux describes.

libbpf relocates against vmlinux first, which has KVM's structures too, and never learns that a module has others.
The format is Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.lab.inside.kvm_readers import read_offsets
from tests.live import GuestProcess

BTF = Path("/sys/kernel/btf")
KIND_STRUCT = 4
# Bytes behind a type: for each kind a fixed part, and one for each of its vlen elements.
EXTRA = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)}
EXTRA |= {17: (4, 0), 19: (0, 12)}
NAMES = {b"kvm", b"kvm_arch", b"kvm_vcpu", b"kvm_vcpu_arch", b"kvm_vcpu_stat"}

Members = list[tuple[bytes, int]]


def iterate_structs(data: bytes, strings: bytes) -> Iterator[tuple[bytes, Members]]:
    """Yields the name and the members, each with its offset in bits, of the structures of NAMES."""

    def name(offset: int) -> bytes:
        return strings[offset : strings.index(b"\0", offset)]

    magic, _version, _flags, start, at, length = struct.unpack_from("<HBBIII", data)
    assert magic == 0xEB9F
    at, end = start + at, start + at + length
    while at < end:
        name_offset, info, _ = struct.unpack_from("<3I", data, at)
        at += 12
        count, kind, has_bitfields = info & 0xFFFF, info >> 24 & 0x1F, info >> 31
        fixed, each = EXTRA.get(kind, (0, 0))
        if kind == KIND_STRUCT and name(name_offset) in NAMES:
            members = struct.iter_unpack("<3I", data[at : at + 12 * count])
            mask = 0xFFFFFF if has_bitfields else 0xFFFFFFFF
            yield name(name_offset), [(name(member), offset & mask) for member, _, offset in members]
        at += fixed + each * count


def read_strings(data: bytes) -> bytes:
    start, _, _, at, length = struct.unpack_from("<5I", data, 4)
    return data[start + at : start + at + length]


@functools.cache
def read_types() -> tuple[Mapping[bytes, Members], Mapping[bytes, Members]]:
    """The structures as vmlinux describes them, and those that the kvm module describes itself."""
    vmlinux, module = (BTF / "vmlinux").read_bytes(), (BTF / "kvm").read_bytes()
    strings = read_strings(vmlinux)
    # A module's types and strings go on where vmlinux's end.
    return dict(iterate_structs(vmlinux, strings)), dict(iterate_structs(module, strings + read_strings(module)))


def test_the_module_has_types_of_its_own() -> None:
    vmlinux, module = read_types()
    assert set(vmlinux) == NAMES
    assert {b"kvm", b"kvm_vcpu", b"kvm_vcpu_stat"} <= set(module)
    added = [name for name, _ in module[b"kvm_vcpu_stat"]][len(vmlinux[b"kvm_vcpu_stat"]) :]
    assert added[0] == b"notify_window_same_rip_exits"


def test_statistics_and_vms_have_grown_at_their_tails_only() -> None:
    vmlinux, module = read_types()
    for name in (b"kvm_vcpu_stat", b"kvm"):
        before = vmlinux[name]
        assert module[name][: len(before)] == before, name
        assert len(module[name]) > len(before)


def test_statistics_of_before_are_described_where_they_were(fresh: GuestProcess) -> None:
    """A reader that takes offsets from the types, and one that takes them from the descriptors, agree."""
    vmlinux, _ = read_types()
    places = {name.decode(): bits // 8 for name, bits in vmlinux[b"kvm_vcpu_stat"]}
    described = read_offsets(fresh, fresh.vcpus[0])
    known = places.keys() & described.keys()
    assert {"exits", "irq_exits", "guest_mode", "notify_window_exits"} <= known
    assert len(known) > 30
    assert {name: described[name] for name in known} == {name: places[name] for name in known}


def test_a_vcpu_is_as_it_was_up_to_its_statistics() -> None:
    vmlinux, module = read_types()
    until = [name for name, _ in vmlinux[b"kvm_vcpu"]].index(b"stat") + 1
    assert module[b"kvm_vcpu"][:until] == vmlinux[b"kvm_vcpu"][:until]


def test_what_is_kvms_own_on_x86_has_not_changed() -> None:
    vmlinux, module = read_types()
    for name in (b"kvm_arch", b"kvm_vcpu_arch"):
        # A module describes only what differs from vmlinux, or leads to what does.
        assert module.get(name, vmlinux[name]) == vmlinux[name], name
