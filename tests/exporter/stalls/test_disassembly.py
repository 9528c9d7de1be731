"""Bytes of guests as text: with capstone and without it, whatever they are."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from exporter.stalls.disassembly import disassemble

WITHOUT_CAPSTONE = """
import sys
sys.modules["capstone"] = None
from exporter.stalls.disassembly import disassemble
assert disassemble(bytes.fromhex("f4"), 0) == ""
"""


def test_the_first_instruction_is_told_with_what_it_leads_to() -> None:
    assert disassemble(bytes.fromhex("e675ebfc"), 0x10000) == "out 0x75, al"
    assert disassemble(bytes.fromhex("ebfe90"), 0xFFFFFFFF81000000) == "jmp 0xffffffff81000000"
    assert disassemble(bytes.fromhex("f3a4"), 0) == "rep movsb byte ptr [rdi], byte ptr [rsi]"


def test_what_is_no_instruction_has_no_text() -> None:
    for code in (b"", b"\x06", bytes.fromhex("0f0b")[:1]):
        assert disassemble(code, 0) == ""


@given(st.binary(max_size=15), st.integers(0, 2**64 - 1))
def test_no_bytes_make_anything_but_a_line_of_plain_text(code: bytes, rip: int) -> None:
    text = disassemble(code, rip)
    assert text.isascii()
    assert text == "" or text.isprintable()


def test_without_capstone_there_is_no_text() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_CAPSTONE], check=True)
