"""Perf events of one thread and one tracepoint, and the ring buffer that they write to.

An event is made disabled, gets its filter, and is only then let go: with a filter set later, records that it should
have dropped come through. It is let go by PERF_EVENT_IOC_REFRESH for a number of records, after which the kernel
disables it by itself. So nothing that a guest does makes an event write more than it was asked for.

Closing the last event of a tracepoint takes it out of the kernel's text and waits for a grace period, some 40 ms.

**Memory ordering.** The kernel writes records, then ``data_head``; it reads ``data_tail`` before it overwrites
(perf_output_put_handle and perf_output_begin in kernel/events/ring_buffer.c). Here ``data_head`` has to be read before
the records, and ``data_tail`` written after. Each is one call of CPython's C code, which no compiler moves across
another; both are aligned 64-bit numbers in native format, which struct.unpack_from and an item of a memoryview move by
a memcpy of constant size, one instruction; and x86-64, the only machine that has notify exits, neither moves a load
before an earlier load nor a store before an earlier load. That is all that load-acquire and store-release mean there.
**Not struct.pack_into**: it writes zeros first, and a kernel that reads 0 as ``data_tail`` drops records for which
there is room.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import time

from kvm import abi, syscalls
from kvm.perf.ring import RingContents, copy_unread, decode_records

_EVENT_ID = struct.Struct("=Q")
_DATA_TAIL_WORD = abi.PERF_MMAP_DATA_TAIL // struct.calcsize("Q")
_SAMPLE_TYPE = abi.PERF_SAMPLE_IDENTIFIER | abi.PERF_SAMPLE_TIME | abi.PERF_SAMPLE_RAW
# What a record takes beside the tracepoint's bytes; the kernel rounds up to 8.
_RECORD_OVERHEAD = abi.PERF_EVENT_HEADER.size + abi.PERF_SAMPLE.size + 8


def open_event(tracepoint_id: int, tid: int, event_filter: str = "", *, with_records: bool = True) -> int:
    """Open a disabled event of a thread with a filter, and return its fd; CLOCK_MONOTONIC times the records.

    Without records it only counts, which needs fewer rights. May wait for other events' grace periods.
    Raises OSError: ESRCH where the thread has ended, EINVAL where the kernel does not know the id or a field.
    """
    if tid <= 0:
        raise ValueError(f"{tid} is no thread: 0 and -1 would be ourselves and everybody")
    period, sample_type = (1, _SAMPLE_TYPE) if with_records else (0, 0)
    flags = abi.PERF_ATTR_DISABLED | abi.PERF_ATTR_USE_CLOCKID
    attr = abi.PERF_EVENT_ATTR.pack(
        *(abi.PERF_TYPE_TRACEPOINT, abi.PERF_EVENT_ATTR.size, tracepoint_id, period, sample_type, 0, flags),
        *(1, 0, 0, 0, 0, 0, 0, time.CLOCK_MONOTONIC),  # wakeup_events: each record wakes who waits
    )
    fd = syscalls.perf_event_open(attr, tid, abi.PERF_FLAG_FD_CLOEXEC)
    try:
        if event_filter:
            fcntl.ioctl(fd, abi.PERF_EVENT_IOC_SET_FILTER, event_filter.encode("ascii"))
    except BaseException:
        os.close(fd)
        raise
    return fd


def allow_records(fd: int, number: int) -> None:
    """Let an event make so many records, after which the kernel switches it off for good; raises OSError."""
    fcntl.ioctl(fd, abi.PERF_EVENT_IOC_REFRESH, number)


def redirect_records(fd: int, target_fd: int) -> None:
    """Make an event write to the ring of another one of the same thread; raises OSError."""
    fcntl.ioctl(fd, abi.PERF_EVENT_IOC_SET_OUTPUT, target_fd)


def read_event_id(fd: int) -> int:
    """Return the number by which the samples of an event can be told; raises OSError."""
    number: int = _EVENT_ID.unpack(fcntl.ioctl(fd, abi.PERF_EVENT_IOC_ID, bytes(_EVENT_ID.size)))[0]
    return number


def read_count(fd: int) -> int | None:
    """Return how often an event has happened, None where the kernel no longer tells; raises OSError.

    Interrupts the CPU that runs the thread, where it is running.
    """
    count = os.read(fd, _EVENT_ID.size)
    return int(_EVENT_ID.unpack(count)[0]) if len(count) == _EVENT_ID.size else None


def has_exited(fd: int) -> bool:
    """Tell whether the thread of an event has exited.

    This takes back the wake-up of the event's ring (perf_poll in kernel/events/core.c), so the ring has to be read
    afterwards: what the wake-up told of stands there by then.
    """
    waiter = select.poll()
    waiter.register(fd, 0)
    return any(events & select.POLLHUP for _fd, events in waiter.poll(0))


def count_pages(record_size: int, records: int) -> int:
    """Return how many pages (a power of two, as perf wants it) hold so many records of a tracepoint."""
    needed = -(-(record_size + _RECORD_OVERHEAD) * records // mmap.PAGESIZE)
    return 1 << max(0, needed - 1).bit_length()


class Ring:
    """The mapped ring buffer of one event; the owner of the event closes the ring first."""

    def __init__(self, fd: int, pages: int) -> None:
        """Map the ring; raises OSError, EPERM where kernel.perf_event_mlock_kb is used up."""
        # Mapped writable, so that the kernel keeps what has not been read and drops what is new.
        try:
            self._map = mmap.mmap(fd, (1 + pages) * mmap.PAGESIZE)
        except OSError as err:
            raise OSError(err.errno, err.strerror, "mmap") from err  # so that it can be told from other refusals
        self._words = memoryview(self._map).cast("Q")

    def read(self) -> RingContents:
        """Take what stands in the ring, without waiting; what makes no sense as a whole counts as one odd record."""
        head, tail, offset, size = abi.PERF_MMAP_DATA.unpack_from(self._map, abi.PERF_MMAP_DATA_HEAD)
        if head == tail:
            return RingContents()
        block = copy_unread(self._map[offset : offset + size], head, tail)
        self._words[_DATA_TAIL_WORD] = head
        return RingContents(odd=1) if block is None else decode_records(block)

    def close(self) -> None:
        """Unmap the ring; may be called twice."""
        self._words.release()
        self._map.close()
