"""Records of kvm:kvm_notify_window: whole ones, unknown RIPs, unreadable pages, and what makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.errors import MalformedData, SourceUnavailable
from kvm.model import Instruction
from kvm.perf.instruction import InstructionReader, decode_instruction
from kvm.perf.tracepoint_format import parse_format

FORMAT = """name: kvm_notify_window
ID: 1234
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:u32 vcpu_id;	offset:8;	size:4;	signed:0;
	field:u32 vectoring_info;	offset:12;	size:4;	signed:0;
	field:u64 rip;	offset:16;	size:8;	signed:0;
	field:u64 exit_qual;	offset:24;	size:8;	signed:0;
	field:u64 streak;	offset:32;	size:8;	signed:0;
	field:bool guest_mode;	offset:40;	size:1;	signed:0;
	field:u8 insn_len;	offset:41;	size:1;	signed:0;
	field:u8 insn[15];	offset:42;	size:15;	signed:0;

print fmt: "vcpu %u"
"""
TRACEPOINT = parse_format(FORMAT, "test")


def pack(rip: int, streak: int, guest_mode: int, length: int, code: bytes) -> bytes:
    record = bytearray(64)
    record[16:24], record[32:40] = rip.to_bytes(8, "little"), streak.to_bytes(8, "little")
    record[40], record[41], record[42 : 42 + len(code)] = guest_mode, length, code
    return bytes(record)


def test_a_record_is_an_instruction() -> None:
    record = pack(0xFFFFFFFF81000000, 12, 1, 4, bytes.fromhex("e675ebfc99"))
    assert decode_instruction(TRACEPOINT, record) == Instruction(
        0xFFFFFFFF81000000, True, 12, bytes.fromhex("e675ebfc")
    )


def test_without_a_rip_there_is_none_and_without_its_page_there_are_no_bytes() -> None:
    assert decode_instruction(TRACEPOINT, pack(0, 0, 0, 0, b"")) is None
    assert decode_instruction(TRACEPOINT, pack(0, 3, 0, 0, b"")) == Instruction(0, False, 3, b"")


def test_more_bytes_than_there_are_and_a_short_record_make_no_sense() -> None:
    for record in (pack(1, 1, 0, 16, b"x" * 15), pack(1, 1, 0, 4, b"x" * 4)[:50], b""):
        with pytest.raises(MalformedData):
            decode_instruction(TRACEPOINT, record)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_instruction_or_none_or_malformed(record: bytes) -> None:
    try:
        found = decode_instruction(TRACEPOINT, record)
    except MalformedData:
        return
    assert found is None or (found.streak and len(found.code) <= 15)


def test_a_kvm_without_the_tracepoint_or_with_another_one_says_so(tmp_path: Path) -> None:
    reader = InstructionReader(tmp_path)
    directory = tmp_path / "events/kvm/kvm_notify_window"
    (tmp_path / "events").mkdir()
    with pytest.raises(SourceUnavailable, match="no tracepoint kvm:kvm_notify_window"):
        reader.read(1, 1, 0.0)
    directory.mkdir(parents=True)
    (directory / "format").write_text(FORMAT.replace("insn[15]", "bytes[15]").replace("streak", "length"))
    with pytest.raises(SourceUnavailable, match="streak, insn"):
        reader.read(1, 1, 0.0)
    (directory / "format").write_text("nothing")
    with pytest.raises(SourceUnavailable, match="no name or no ID"):
        reader.read(1, 1, 0.0)
