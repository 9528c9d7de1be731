"""Understands the bytes of a perf ring buffer: samples, and how many the kernel had to drop. Pure.

The layout is that of include/uapi/linux/perf_event.h for events with PERF_SAMPLE_IDENTIFIER, PERF_SAMPLE_TIME and
PERF_SAMPLE_RAW. What is not understood is counted and never guessed at.
"""

from __future__ import annotations

from typing import NamedTuple

from kvm import abi


class Sample(NamedTuple):
    """One record of a tracepoint: which event made it, when (by that event's clock), and the tracepoint's bytes."""

    event_id: int
    time_ns: int
    raw: bytes


class RingContents(NamedTuple):
    """What stood in the ring: ``lost`` samples found it full, ``odd`` records could not be understood."""

    samples: tuple[Sample, ...] = ()
    lost: int = 0
    odd: int = 0


def copy_unread(ring: bytes, head: int, tail: int) -> bytes | None:
    """Return the bytes between two positions of a ring in one piece, None where there cannot be so many.

    Positions count every byte ever written; they are taken modulo the length of the ring.
    """
    length = head - tail
    if not 0 <= length <= len(ring):
        return None
    start = tail % len(ring)
    return ring[start : start + length] + ring[: max(0, start + length - len(ring))]


def decode_records(block: bytes) -> RingContents:
    """Decode records that stand one behind the other.

    Records of unknown types are odd, and so are samples shorter than they say; both are skipped by the length in their
    header. Where that length makes no sense the rest of the block cannot be told apart, and counts as one.
    """
    samples: list[Sample] = []
    lost = odd = position = 0
    while position < len(block):
        payload_at = position + abi.PERF_EVENT_HEADER.size
        if payload_at > len(block):
            odd += 1
            break
        kind, _misc, size = abi.PERF_EVENT_HEADER.unpack_from(block, position)
        if size < abi.PERF_EVENT_HEADER.size or position + size > len(block):
            odd += 1
            break
        payload = block[payload_at : position + size]
        position += size
        sample = decode_sample(payload) if kind == abi.PERF_RECORD_SAMPLE else None
        dropped = decode_lost(kind, payload)
        if sample is not None:
            samples.append(sample)
        elif dropped is not None:
            lost += dropped
        else:
            odd += 1
    return RingContents(tuple(samples), lost, odd)


def decode_sample(payload: bytes) -> Sample | None:
    """Decode what follows the header of a sample; None where it is shorter than it says. More bytes do no harm."""
    if len(payload) < abi.PERF_SAMPLE.size:
        return None
    event_id, time_ns, raw_size = abi.PERF_SAMPLE.unpack_from(payload)
    raw = payload[abi.PERF_SAMPLE.size : abi.PERF_SAMPLE.size + raw_size]
    return Sample(event_id, time_ns, raw) if len(raw) == raw_size else None


def decode_lost(kind: int, payload: bytes) -> int | None:
    """Return how many samples a record says were dropped; None where it does not speak of that."""
    layout = {abi.PERF_RECORD_LOST: abi.PERF_LOST, abi.PERF_RECORD_LOST_SAMPLES: abi.PERF_LOST_SAMPLES}.get(kind)
    if layout is None or len(payload) < layout.size:
        return None
    *_id, lost = layout.unpack_from(payload)
    return int(lost)
