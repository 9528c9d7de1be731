"""The compiled BPF objects are what their sources say, and their structs are what Python takes them for."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from kvm.bpf import notify_trigger, vcpu_decode, vcpu_programs
from tests import build_bpf

# Everything that the kernel or libbpf reads of an object; the rest are names of compilers and tables of names.
MEANT = (".text", "iter/", "raw_tp", "fentry", "fexit", "license", ".maps", ".BTF", ".rel")
BTF_KIND_STRUCT, BTF_KIND_ENUM64 = 4, 19
# include/uapi/linux/btf.h: bytes after struct btf_type, a fixed number and a number for each of vlen
BTF_TAILS = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12), 17: (4, 0)}


class Struct(NamedTuple):
    size: int
    offsets: dict[str, int]


def read_sections(path: Path) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name."""
    elf = path.read_bytes()
    at, size, count, names = *struct.unpack_from("<40xQ10xHHH", elf)[:1], *struct.unpack_from("<58xHHH", elf)
    headers = [struct.unpack_from("<IIQQQQ", elf, at + n * size) for n in range(count)]
    table = elf[headers[names][4] :]
    return {
        table[name : table.index(b"\0", name)].decode(): b"" if kind == 8 else elf[offset : offset + length]
        for name, kind, _, _, offset, length in headers
    }


def parse_structs(btf: bytes) -> dict[str, Struct]:
    """The structs of a BTF section (include/uapi/linux/btf.h)."""
    _, _, _, header, types_at, types_length, names_at = struct.unpack_from("<HBBIIII", btf)
    names = btf[header + names_at :]
    at, end = header + types_at, header + types_at + types_length
    found = {}
    while at < end:
        name, info, size = struct.unpack_from("<III", btf, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        fixed, each = BTF_TAILS.get(kind, (0, 0))
        if kind == BTF_KIND_STRUCT:
            members = [struct.unpack_from("<III", btf, at + 12 + 12 * n) for n in range(count)]
            offsets = {read_name(names, member): bits // 8 for member, _, bits in members}
            found[read_name(names, name)] = Struct(size, offsets)
        at += 12 + fixed + each * count
    return found


def read_name(names: bytes, offset: int) -> str:
    return names[offset : names.index(b"\0", offset)].decode()


def place(fields: str, formats: str) -> dict[str, int]:
    """Where struct.Struct puts these fields; a format for each, in order."""
    return {name: struct.calcsize("=" + " ".join(formats.split()[:n])) for n, name in enumerate(fields.split())}


@pytest.mark.parametrize("name", build_bpf.OBJECTS)
def test_the_object_is_what_its_source_says(name: str, tmp_path: Path) -> None:
    if shutil.which(build_bpf.CLANG) is None or shutil.which(build_bpf.STRIP) is None:
        pytest.skip(f"{build_bpf.CLANG} and {build_bpf.STRIP} are not installed")
    elsewhere = tmp_path / "sources"
    elsewhere.mkdir()
    for path in build_bpf.SOURCES.glob("*.bpf.[ch]"):
        shutil.copy(path, elsewhere)
    rebuilt = tmp_path / name
    build_bpf.build(name, rebuilt, elsewhere)
    committed, fresh = (read_sections(path) for path in (build_bpf.SOURCES / name, rebuilt))
    meant = {section for section in committed.keys() | fresh.keys() if section.startswith(MEANT)}
    assert {".BTF", ".BTF.ext", "license"} < meant
    differing = [section for section in sorted(meant) if committed.get(section) != fresh.get(section)]
    assert differing == [], "run python -m tests.build_bpf"


@pytest.mark.parametrize("name", build_bpf.OBJECTS)
def test_the_object_holds_neither_debug_sections_nor_directories_of_who_built_it(name: str) -> None:
    sections = read_sections(build_bpf.SOURCES / name)
    assert [section for section in sections if section.startswith(".debug")] == []
    assert b"/kvm/bpf/programs" not in (build_bpf.SOURCES / name).read_bytes()


def test_what_is_shared_with_vcpus_lies_where_python_takes_it() -> None:
    structs = parse_structs(read_sections(vcpu_programs.OBJECT)[".BTF"])
    names = " ".join(name for name, _ in vcpu_programs.CONTROL_FIELDS)
    formats = " ".join(format_ for _, format_ in vcpu_programs.CONTROL_FIELDS)
    assert structs["control"] == (vcpu_programs.CONTROL_BYTES, place(names, formats))
    vm = "kvm mm start_boottime tgid vm_fd first count notify_window notify_vmexit_flags next has_notify missing"
    assert structs["vm"] == (vcpu_decode.VM_RECORD.size, place(f"{vm} reserved", "Q Q Q I i I I I I I I I I"))
    assert structs["vcpu_identity"] == (vcpu_decode.IDENTITY.size, place("vcpu_id tid", "I i"))
    state = place(
        "regs rip regs_avail vcpu_id tid guest_state_protected vm_type statistics",
        f"16Q Q Q I i I I {vcpu_programs.STATISTICS_BYTES}s",
    )
    assert structs["vcpu_state"] == (vcpu_decode.STATE_RECORD.size + vcpu_programs.STATISTICS_BYTES, state)


def test_what_is_shared_with_notify_lies_where_python_takes_it() -> None:
    structs = parse_structs(read_sections(notify_trigger.OBJECT)[".BTF"])
    control = "again_ns exit_reason flags own_tgid reserved lost uncounted"
    assert structs["control"] == (40, place(control, "Q I I I I Q Q"))
    assert structs["vcpu_thread"] == (24, place("start_boottime tgid tid vcpu_id reserved", "Q I I I I"))
