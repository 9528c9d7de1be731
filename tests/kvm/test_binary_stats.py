"""The decoder of KVM's binary statistics, on a block captured from a kernel and on simulated and broken ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm import abi
from kvm.binary_stats import (
    MAX_DATA_BYTES,
    Statistic,
    StatsHeader,
    decode_descriptors,
    decode_header,
    decode_values,
    find_counters,
    is_counter,
    measure_values,
)
from kvm.counters.stats_fd import check_safe_to_borrow
from kvm.counters.stats_layout import plan_layout
from kvm.errors import MalformedData, SourceUnavailable

FIXTURES = Path(__file__).parents[1] / "fixtures" / "stats"
CAPTURES = sorted(FIXTURES.glob("*.bin"))

names = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=20)
statistics = st.lists(
    st.builds(
        Statistic,
        name=names,
        flags=st.integers(0, 0x24F),
        exponent=st.integers(-30, 30),
        size=st.integers(0, 64),
        offset=st.integers(0, 4000),
        bucket_size=st.integers(0, 2**32 - 1),
    ),
    unique_by=lambda statistic: statistic.name,
    max_size=20,
)


def encode(described: list[Statistic], name_size: int) -> tuple[StatsHeader, bytes]:
    header = StatsHeader(0, name_size, len(described), 24, 24 + name_size, 0)
    block = b"".join(
        abi.KVM_STATS_DESC.pack(one.flags, one.exponent, one.size, one.offset, one.bucket_size)
        + one.name.encode().ljust(name_size, b"\0")
        for one in described
    )
    return header, block


def test_there_are_captures() -> None:
    assert CAPTURES


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_captured_file_decodes_to_what_the_kernel_said(capture: Path) -> None:
    block = capture.read_bytes()
    said = json.loads(capture.with_suffix(".json").read_text())
    header = decode_header(block, "capture")
    descriptors = decode_descriptors(header, block[header.desc_offset :], "capture")
    assert len(descriptors) == header.num_desc == said["descriptors"]
    values = decode_values(descriptors, block[header.data_offset :])
    assert values.keys() == descriptors.keys()
    assert (values["exits"], values["notify_window_exits"]) == ((said["exits"],), (said["notify_window_exits"],))
    shorter = decode_values(descriptors, block[header.data_offset :][: measure_values(descriptors.values()) - 1])
    assert shorter.items() < values.items()
    layout = plan_layout(header, find_counters(descriptors, ["exits", "notify_window_exits", "no_such_statistic"]))
    values = dict(zip(layout.names, layout.values.unpack_from(block), strict=True))
    assert values == {"exits": said["exits"], "notify_window_exits": said["notify_window_exits"]}
    assert not is_counter(descriptors["halt_wait_hist"])  # a histogram
    assert not is_counter(descriptors["guest_mode"])  # an instant value


@given(statistics, st.integers(20, 64))
def test_decoding_gives_back_what_was_encoded(described: list[Statistic], name_size: int) -> None:
    header, block = encode(described, name_size)
    assert list(decode_descriptors(header, block, "here").values()) == described


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_malformed(block: bytes) -> None:
    try:
        header = decode_header(block, "here")
        decode_descriptors(header, block[24:], "here")
    except MalformedData as err:
        assert err.origin == "here"


@given(statistics.filter(bool), st.data())
def test_a_truncated_block_is_malformed(described: list[Statistic], data: st.DataObject) -> None:
    header, block = encode(described, 48)
    cut = data.draw(st.integers(0, len(block) - 1))
    with pytest.raises(MalformedData, match="expected"):
        decode_descriptors(header, block[:cut], "here")


@pytest.mark.parametrize(
    "statistic",
    [Statistic("far", 0, 0, 1, MAX_DATA_BYTES, 0), Statistic("wide", 0, 0, 65535, MAX_DATA_BYTES - 8, 0)],
    ids=lambda statistic: statistic.name,
)
def test_absurd_offsets_are_malformed(statistic: Statistic) -> None:
    with pytest.raises(MalformedData, match=statistic.name):
        decode_descriptors(*encode([statistic], 48), "here")


def test_names_that_repeat_or_are_empty_are_malformed() -> None:
    one = Statistic("exits", 0, 0, 1, 0, 0)
    with pytest.raises(MalformedData, match="exits"):
        decode_descriptors(*encode([one, one], 48), "here")
    with pytest.raises(MalformedData, match="without a name"):
        decode_descriptors(*encode([Statistic("", 0, 0, 1, 0, 0)], 48), "here")


def test_absurd_headers_are_malformed() -> None:
    for header in [(0, 0, 1, 0, 0, 0), (0, 2**31, 1, 0, 0, 0), (0, 48, 2**32 - 1, 0, 0, 0), (0, 48, 1, 0, 0, 2**31)]:
        with pytest.raises(MalformedData, match="absurd"):
            decode_header(abi.KVM_STATS_HEADER.pack(*header), "here")


def test_a_layout_reads_scattered_counters_with_one_read() -> None:
    layout = plan_layout(StatsHeader(0, 48, 2, 24, 72, 1000), {"late": 96, "early": 8, "between": 40})
    assert (layout.names, layout.length) == (("early", "between", "late"), 1104)
    block = bytearray(1104)
    for at, value in ((1008, 11), (1040, 22), (1096, 2**64 - 1)):
        block[at : at + 8] = value.to_bytes(8, "little")
    assert layout.values.unpack(block) == (11, 22, 2**64 - 1)


@given(st.integers(0, 70_000))
def test_the_symbol_is_found_wherever_it_stands(before: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * before + b"0000 t kvm_vcpu_stats_release\t[kvm]\n" + b"y" * 100)
        file.flush()
        check_safe_to_borrow(Path(file.name))


@pytest.mark.parametrize(
    ("symbols", "reason"),
    [
        (b"0000 t kvm_vcpu_ioctl\t[kvm]\n", "reading is unsafe on this kernel"),
        (b"0000 t do_exit\n", "KVM is not loaded"),
        (b"", "is masked"),
        (None, "cannot be read"),
    ],
)
def test_why_reading_may_be_unsafe_is_told(tmp_path: Path, symbols: bytes | None, reason: str) -> None:
    kallsyms = tmp_path / "kallsyms"
    if symbols is not None:
        kallsyms.write_bytes(symbols)
    with pytest.raises(SourceUnavailable, match=reason) as refused:
        check_safe_to_borrow(kallsyms)
    assert refused.value.remedy
