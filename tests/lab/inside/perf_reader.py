"""Records of a tracepoint for one thread, by perf_event_open and nothing else.

The layout of a record is taken from ``events/*/*/format``. The event is made disabled, gets its filter,
and only then is enabled: with a filter set after enabling, records that it should have dropped come through.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EVENTS = Path("/sys/kernel/tracing/events")
FORMAT_LINE = re.compile(r"field:.*?(\w+)(?:\[\d+\])?;\s*offset:(\d+);\s*size:(\d+);\s*signed:([01]);")

# include/uapi/linux/perf_event.h
PERF_TYPE_TRACEPOINT = 2
PERF_SAMPLE_TID, PERF_SAMPLE_RAW = 1 << 1, 1 << 10
PERF_RECORD_LOST, PERF_RECORD_SAMPLE = 2, 9
ATTR_DISABLED = 1 << 0
PERF_EVENT_IOC_ENABLE, PERF_EVENT_IOC_SET_FILTER = 0x2400, 0x40082406
PERF_FLAG_FD_CLOEXEC = 8
SYS_PERF_EVENT_OPEN = 298
DATA_HEAD, DATA_TAIL = 1024, 1032
DATA_PAGES = 512


@dataclass(frozen=True)
class Field:
    """Where one field of a record is."""

    offset: int
    size: int
    signed: bool


def parse_format(text: str) -> dict[str, Field]:
    """Returns the fields that the text of a format file names."""
    return {name: Field(int(o), int(s), signed == "1") for name, o, s, signed in FORMAT_LINE.findall(text)}


def read_format(event: str) -> dict[str, Field]:
    """Reads the fields of a tracepoint, such as ``kvm/kvm_exit``."""
    return parse_format((EVENTS / event / "format").read_text(encoding="ascii"))


class PerfReader:
    """An enabled event of one thread; made by `open_perf_reader`."""

    def __init__(self, fd: int, fields: dict[str, Field]) -> None:
        self._fd = fd
        self._fields = fields
        self._ring = mmap.mmap(fd, (1 + DATA_PAGES) * mmap.PAGESIZE)
        self._words = memoryview(self._ring).cast("Q")

    def close(self) -> None:
        """Unmaps the ring and closes the event."""
        self._words.release()
        self._ring.close()
        os.close(self._fd)

    def read(self) -> list[dict[str, int]]:
        """Returns the records since the last call; AssertionError when the kernel had to drop some."""
        head, tail = struct.unpack_from("QQ", self._ring, DATA_HEAD)
        records = []
        while tail < head:
            kind, _misc, size = struct.unpack("<IHH", self._bytes(tail, 8))
            assert kind != PERF_RECORD_LOST, "the ring was too small for this test"
            if kind == PERF_RECORD_SAMPLE:
                records.append(self._decode(self._bytes(tail + 8, size - 8)))
            tail += size
        self._words[DATA_TAIL // 8] = tail
        return records

    def _bytes(self, position: int, count: int) -> bytes:
        length = DATA_PAGES * mmap.PAGESIZE
        start = mmap.PAGESIZE + position % length
        whole = self._ring[start : min(start + count, mmap.PAGESIZE + length)]
        return whole + self._ring[mmap.PAGESIZE : mmap.PAGESIZE + count - len(whole)]

    def _decode(self, sample: bytes) -> dict[str, int]:
        pid, tid, raw_size = struct.unpack_from("<III", sample)
        raw = sample[12 : 12 + raw_size]
        values = {
            name: int.from_bytes(raw[field.offset : field.offset + field.size], "little", signed=field.signed)
            for name, field in self._fields.items()
        }
        return {**values, "pid": pid, "tid": tid}


@contextmanager
def open_perf_reader(event: str, tid: int, event_filter: str = "") -> Iterator[PerfReader]:
    """Yields a reader of a tracepoint's records for one thread; OSError where the kernel refuses."""
    identity = int((EVENTS / event / "id").read_text(encoding="ascii"))
    sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_RAW
    attr = bytearray(128)
    struct.pack_into("<IIQQQQQI", attr, 0, PERF_TYPE_TRACEPOINT, 128, identity, 1, sample_type, 0, ATTR_DISABLED, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    attr_address = ctypes.addressof((ctypes.c_char * len(attr)).from_buffer(attr))
    arguments = (ctypes.c_void_p(attr_address), tid, -1, -1, ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC))
    fd = libc.syscall(SYS_PERF_EVENT_OPEN, *arguments)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"perf_event_open of {event} for {tid}: {os.strerror(ctypes.get_errno())}")
    reader = PerfReader(fd, read_format(event))
    try:
        if event_filter:
            fcntl.ioctl(fd, PERF_EVENT_IOC_SET_FILTER, event_filter.encode() + b"\0")
        fcntl.ioctl(fd, PERF_EVENT_IOC_ENABLE, 0)
        yield reader
    finally:
        reader.close()
