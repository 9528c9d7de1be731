"""Of KVM's own structs a module's count, of all others vmlinux's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.bpf.btf import find_structs, merge_types, read_name, read_types, split_sections
from kvm.errors import MalformedData
from tests.btf_types import KIND_INT, pack_btf, pack_struct

STRINGS = b"\0int\0list_head\0kvm\0kvm_vcpu\0"
INT, LIST_HEAD, KVM, KVM_VCPU = (
    STRINGS.index(b"\0" + name + b"\0") + 1 for name in (b"int", b"list_head", b"kvm", b"kvm_vcpu")
)
AN_INT = INT.to_bytes(4, "little") + (KIND_INT << 24).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(4)
VMLINUX = pack_btf(
    AN_INT + pack_struct(LIST_HEAD, 16) + pack_struct(KVM, 100) + pack_struct(KVM_VCPU, 200, [(INT, 1, 64)]), STRINGS
)
OWN_STRINGS = b"kvm_new\0kvm_vcpu\0"
KVM_NEW, KVM_VCPU_AGAIN = len(STRINGS), len(STRINGS) + len(b"kvm_new\0")


def find_sizes(data: bytes) -> list[tuple[bytes, int]]:
    """Every struct that has a name, with its size."""
    types, strings = split_sections(data, "test")
    return [
        (read_name(strings, name), int.from_bytes(types[at + 8 : at + 12], "little"))
        for at, name in find_structs(types, "test")
    ]


@pytest.mark.parametrize("name", [KVM_VCPU, KVM_VCPU_AGAIN])
def test_a_modules_struct_takes_the_place_of_vmlinuxs(name: int) -> None:
    module = pack_btf(pack_struct(name, 224, [(INT, 1, 256)]) + pack_struct(KVM_NEW, 8), OWN_STRINGS)
    merged = merge_types(VMLINUX, module)
    assert merged is not None
    assert find_sizes(merged) == [(b"list_head", 16), (b"kvm", 100), (b"kvm_vcpu", 224), (b"kvm_new", 8)]


def test_types_and_strings_go_on_where_vmlinuxs_end() -> None:
    own = pack_struct(KVM_VCPU, 224, [(INT, 1, 256)])
    merged = merge_types(VMLINUX, pack_btf(own, OWN_STRINGS))
    assert merged is not None
    base = split_sections(VMLINUX, "test")
    types, strings = split_sections(merged, "test")
    assert (len(types), strings) == (len(base.types) + len(own), STRINGS + OWN_STRINGS)
    assert types.endswith(own)


def test_a_struct_that_is_not_kvms_stays_vmlinuxs() -> None:
    module = pack_btf(pack_struct(LIST_HEAD, 99) + pack_struct(KVM, 124), b"")
    merged = merge_types(VMLINUX, module)
    assert merged is not None
    assert find_sizes(merged) == [(b"list_head", 16), (b"kvm_vcpu", 200), (b"kvm", 124)]


def test_a_module_without_structs_of_kvms_changes_nothing() -> None:
    assert merge_types(VMLINUX, pack_btf(pack_struct(LIST_HEAD, 99), b"")) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes are too few for a header"),
        (b"\x7fELF" + bytes(60), "magic 0x457f, version 76"),
        (VMLINUX[:-1], "it is cut off"),
        (pack_btf(pack_struct(KVM, 9)[:-1], b""), "its last type is cut off"),
        (pack_btf(bytes(7) + b"\x1e" + bytes(4), b""), "unknown kind of type 30"),
    ],
)
def test_what_makes_no_sense_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedData) as refused:
        merge_types(VMLINUX, data)
    assert (refused.value.origin, refused.value.reason) == ("the kvm module's types", reason)
    with pytest.raises(MalformedData, match="vmlinux's types"):
        merge_types(data, pack_btf(pack_struct(1, 9), b"\0kvm\0"))


def test_a_kvm_that_is_built_in_has_no_file(tmp_path: Path) -> None:
    assert read_types(tmp_path) is None


def test_the_two_files_are_read_where_the_kernel_has_them(tmp_path: Path) -> None:
    directory = tmp_path / "kernel" / "btf"
    directory.mkdir(parents=True)
    module = pack_btf(pack_struct(KVM, 124), b"")
    (directory / "kvm").write_bytes(module)
    with pytest.raises(FileNotFoundError):
        read_types(tmp_path)
    (directory / "vmlinux").write_bytes(VMLINUX)
    assert read_types(tmp_path) == merge_types(VMLINUX, module)
