"""Rings of any content: what was written is read, what is broken is counted."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from kvm.perf.ring import RingContents, Sample, copy_unread, decode_records

# include/uapi/linux/perf_event.h
LOST, THROTTLE, SAMPLE, LOST_SAMPLES = 2, 5, 9, 13


def pack_record(kind: int, payload: bytes) -> bytes:
    """A record as the kernel writes it: padded to 8 bytes, its size with the header's."""
    payload += bytes(-len(payload) % 8)
    return struct.pack("<IHH", kind, 2, 8 + len(payload)) + payload


def pack_sample(sample: Sample) -> bytes:
    return pack_record(SAMPLE, struct.pack("<QQI", sample.event_id, sample.time_ns, len(sample.raw)) + sample.raw)


U64 = st.integers(0, 2**64 - 1)
SAMPLES = st.builds(Sample, U64, U64, st.binary(max_size=100))
# A record, and what it means: a sample, a number of lost ones, or nothing that is known.
RECORDS = st.one_of(
    SAMPLES.map(lambda sample: (pack_sample(sample), sample)),
    st.integers(0, 2**32).map(lambda lost: (pack_record(LOST, struct.pack("<QQ", 7, lost)), lost)),
    st.integers(0, 2**32).map(lambda lost: (pack_record(LOST_SAMPLES, struct.pack("<Q", lost)), lost)),
    st.tuples(st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14, 77, 2**32 - 1]), st.binary(max_size=64)).map(
        lambda made: (pack_record(*made), None)
    ),
)


def expect(meanings: list[Sample | int | None]) -> RingContents:
    samples = tuple(meaning for meaning in meanings if isinstance(meaning, Sample))
    lost = sum(meaning for meaning in meanings if isinstance(meaning, int))
    return RingContents(samples, lost, meanings.count(None))


@given(st.lists(RECORDS, max_size=20), st.integers(0, 2**63), st.integers(0, 7))
def test_what_was_written_is_read_wherever_the_ring_wraps(
    records: list[tuple[bytes, Sample | int | None]], tail: int, spare: int
) -> None:
    block = b"".join(packed for packed, _ in records)
    size = 1 << (len(block) + spare).bit_length()
    ring = bytearray(b"\xee" * size)
    for position, byte in enumerate(block, tail):
        ring[position % size] = byte
    unread = copy_unread(bytes(ring), tail + len(block), tail)
    assert unread == block
    assert decode_records(unread) == expect([meaning for _, meaning in records])


@given(st.lists(RECORDS, min_size=1, max_size=6), st.data())
def test_a_torn_end_is_counted_and_what_stands_before_it_kept(
    records: list[tuple[bytes, Sample | int | None]], data: st.DataObject
) -> None:
    *whole, (last, _) = records
    torn = last[: data.draw(st.integers(1, len(last) - 1))]
    read = decode_records(b"".join(packed for packed, _ in whole) + torn)
    assert read == expect([*(meaning for _, meaning in whole), None])


@given(SAMPLES, st.binary(min_size=1, max_size=40))
def test_a_longer_sample_is_read_as_far_as_it_is_known(sample: Sample, more: bytes) -> None:
    payload = struct.pack("<QQI", sample.event_id, sample.time_ns, len(sample.raw)) + sample.raw + more
    assert decode_records(pack_record(SAMPLE, payload) + pack_sample(sample)) == RingContents((sample, sample))


@given(SAMPLES.filter(lambda sample: bool(sample.raw)))
def test_a_sample_that_is_shorter_than_it_says_is_odd_and_the_next_is_read(sample: Sample) -> None:
    payload = struct.pack("<QQI", sample.event_id, sample.time_ns, len(sample.raw) + 8) + sample.raw
    header = struct.pack("<IHH", SAMPLE, 0, 8 + len(payload))
    for short in (header + payload, struct.pack("<IHH", SAMPLE, 0, 27) + payload[:19]):
        assert decode_records(short + pack_sample(sample)) == RingContents((sample,), odd=1)


@given(st.sampled_from([LOST, LOST_SAMPLES]), st.integers(0, 7))
def test_a_loss_that_does_not_say_how_much_is_odd(kind: int, size: int) -> None:
    assert decode_records(struct.pack("<IHH", kind, 0, 8 + size) + bytes(size)) == RingContents(odd=1)


def test_a_record_without_length_ends_the_block() -> None:
    """Nothing behind it can be told apart, and going on at the same place would never end."""
    sample = Sample(1, 2, b"three")
    for size in range(8):
        block = pack_sample(sample) + struct.pack("<IHH", SAMPLE, 0, size) + pack_sample(sample)
        assert decode_records(block) == RingContents((sample,), odd=1)


@given(st.binary(max_size=400))
def test_any_bytes_end_and_invent_nothing(block: bytes) -> None:
    contents = decode_records(block)
    assert all(sample.raw in block for sample in contents.samples)


@given(st.binary(min_size=8, max_size=64), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_positions_that_cannot_be_are_refused(ring: bytes, head: int, tail: int) -> None:
    unread = copy_unread(ring, head, tail)
    if 0 <= head - tail <= len(ring):
        assert unread is not None
        assert len(unread) == head - tail
    else:
        assert unread is None
