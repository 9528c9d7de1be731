"""The formats of kvm:kvm_exit that real kernels print, and any that a later one may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.errors import MalformedData
from kvm.perf.tracepoint_format import Field, Tracepoint, parse_format

CAPTURES = Path(__file__).parents[2] / "fixtures" / "tracepoints"
KERNELS = sorted(path.stem for path in CAPTURES.glob("*.format"))
COMMON = {
    "common_type": Field(0, 2, False),
    "common_flags": Field(2, 1, False),
    "common_preempt_count": Field(3, 1, False),
    "common_pid": Field(4, 4, True),
}
# As printed by hand from the captures; `requests` is new in Linux 6.14.
KVM_EXIT = COMMON | {
    "exit_reason": Field(8, 4, False),
    "guest_rip": Field(16, 8, False),
    "isa": Field(24, 4, False),
    "info1": Field(32, 8, False),
    "info2": Field(40, 8, False),
    "intr_info": Field(48, 4, False),
    "error_code": Field(52, 4, False),
    "vcpu_id": Field(56, 4, False),
}
REQUESTS = {"requests": Field(64, 8, False)}


def read_capture(kernel: str) -> str:
    return (CAPTURES / f"{kernel}.format").read_text()


def render_format(fields: dict[str, Field], number: int = 5) -> str:
    lines = [
        f"\tfield:unsigned long {name};\toffset:{f.offset};\tsize:{f.size};\tsigned:{int(f.signed)};"
        for name, f in fields.items()
    ]
    return "\n".join(["name: simulated", f"ID: {number}", "format:", *lines, "", 'print fmt: "%u", REC->a', ""])


def test_there_are_captures_of_several_kernels() -> None:
    assert {"linux-6.1", "linux-6.12", "linux-6.18"} <= set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_captured_formats(kernel: str) -> None:
    tracepoint = parse_format(read_capture(kernel), kernel)
    release = json.loads((CAPTURES / f"{kernel}.json").read_text())["kernel"]
    with_requests = tuple(int(number) for number in kernel.removeprefix("linux-").split(".")) >= (6, 14)
    assert release.startswith(kernel.removeprefix("linux-"))
    assert tracepoint.fields == KVM_EXIT | (REQUESTS if with_requests else {})
    assert (tracepoint.name, tracepoint.size) == ("kvm_exit", 72 if with_requests else 60)
    assert tracepoint.id > 0


@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ("char comm[16]", "comm"),
        ("__data_loc char[] name", "name"),
        ("const char * filename", "filename"),
        ("unsigned long args[6]", "args"),
        ("struct { u64 a } odd", "odd"),
    ],
)
def test_declarations_of_any_type(declaration: str, name: str) -> None:
    text = f"name: x\nID: 1\nformat:\n\tfield:{declaration};\toffset:8;\tsize:16;\tsigned:0;\n"
    assert parse_format(text, "x").fields == {name: Field(8, 16, False)}


def test_attributes_may_be_missing_or_new() -> None:
    fields = "\tfield:u64 a;\toffset:8;\tsize:8;\n\tfield:u8 b;\toffset:16;\tsize:1;\tsigned:1;\tnew:1;\n"
    text = f"name: x\nID: 1\nformat:\n{fields}"
    assert parse_format(text, "x").fields == {"a": Field(8, 8, False), "b": Field(16, 1, True)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no name"),
        ("name: x\nformat:\n\tfield:u64 a;\toffset:8;\tsize:8;\tsigned:0;\n", "no ID"),
        ("name: x\nID: 1\nformat:\n", "names no fields"),
        (render_format({"a": Field(2**20, 8, False)}), "makes no sense"),
        ("name: x\nID: 1\n\tfield:&&;\toffset:8;\tsize:8;\tsigned:0;\n", "makes no sense"),
        (render_format({"a": Field(0, 8, False)}).replace("print fmt", "\tfield:int a;\toffset:8;\tsize:4;\n"), "two"),
    ],
)
def test_formats_that_make_no_sense(text: str, reason: str) -> None:
    with pytest.raises(MalformedData, match=reason) as caught:
        parse_format(text, "where it was")
    assert caught.value.origin == "where it was"


def test_fields_that_are_missing_or_no_numbers() -> None:
    tracepoint = Tracepoint("x", 1, {"a": Field(0, 8, False), "b": Field(8, 16, False)})
    assert tracepoint.find_missing(["a", "b", "c"]) == ("b", "c")


def test_a_record_that_is_too_short() -> None:
    tracepoint = Tracepoint("x", 1, {"a": Field(0, 4, False), "b": Field(4, 8, False)})
    assert tracepoint.decode(bytes(11) + b"\1", ["b", "a"]) == (1 << 56, 0)
    with pytest.raises(MalformedData, match="a record of 11 bytes has no b at 4"):
        tracepoint.decode(bytes(11), ["a", "b"])


@given(st.text())
def test_any_text_is_understood_or_refused(text: str) -> None:
    for whole in (text, f"name: x\nID: 1\n{text}", f"name: x\nID: 1\n\tfield:{text}"):
        try:
            parse_format(whole, "x")
        except MalformedData:
            continue


FIELD = st.tuples(st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True), st.sampled_from([1, 2, 4, 8]), st.booleans())


@given(st.lists(FIELD, min_size=1, max_size=12, unique_by=lambda field: field[0]), st.data())
def test_fields_in_any_order_give_back_what_was_packed(made: list[tuple[str, int, bool]], data: st.DataObject) -> None:
    fields: dict[str, Field] = {}
    record = b""
    values = {}
    for name, size, signed in made:
        record += bytes(data.draw(st.integers(0, 3)))
        fields[name] = Field(len(record), size, signed)
        low, high = (-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1) if signed else (0, (1 << 8 * size) - 1)
        values[name] = data.draw(st.integers(low, high))
        record += values[name].to_bytes(size, "little", signed=signed)
    shuffled = {name: fields[name] for name in data.draw(st.permutations(list(fields)))}
    tracepoint = parse_format(render_format(shuffled), "made up")
    wanted = data.draw(st.lists(st.sampled_from(list(fields))))
    assert tracepoint.decode(record + data.draw(st.binary(max_size=8)), wanted) == tuple(
        values[name] for name in wanted
    )
