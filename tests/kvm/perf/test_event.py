"""The ring of an event, as the kernel sees what its reader writes."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys

from kvm import abi
from kvm.perf.event import Ring
from kvm.perf.ring import RingContents

PAGES = 4
READS = 300_000
TAIL_WORD, STOP_WORD = abi.PERF_MMAP_DATA_TAIL // 8, 0
RECORD = struct.pack("=IHH", 77, 0, 8)  # of no known type, and without a payload
# Looks at data_tail without end, as the kernel on another CPU does before each record.
WATCHER = f"""
import mmap
words = memoryview(mmap.mmap(int(input()), mmap.PAGESIZE)).cast("Q")
last = moved = went_back = 0
print("looking", flush=True)
while not words[{STOP_WORD}]:
    now = words[{TAIL_WORD}]
    moved += now > last
    went_back += now < last
    last = now
print(moved, went_back)
"""


def test_the_tail_never_goes_back_for_a_moment() -> None:
    """The kernel drops a record where the tail seems to be far behind, however much room there is."""
    fd = os.memfd_create("ring")
    os.truncate(fd, (1 + PAGES) * mmap.PAGESIZE)
    with mmap.mmap(fd, 0) as memory, memoryview(memory).cast("Q") as words:
        layout = abi.PERF_MMAP_DATA.pack(0, 0, mmap.PAGESIZE, PAGES * mmap.PAGESIZE)
        memory[abi.PERF_MMAP_DATA_HEAD : abi.PERF_MMAP_DATA_HEAD + len(layout)] = layout
        memory[mmap.PAGESIZE :] = RECORD * (PAGES * mmap.PAGESIZE // len(RECORD))
        ring = Ring(fd, PAGES)
        command = [sys.executable, "-c", WATCHER]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True
        ) as watcher:
            assert watcher.stdin is not None and watcher.stdout is not None
            try:
                print(fd, file=watcher.stdin, flush=True)
                assert watcher.stdout.readline() == "looking\n"
                for number in range(1, READS + 1):
                    words[abi.PERF_MMAP_DATA_HEAD // 8] = number * len(RECORD)
                    assert ring.read() == RingContents(odd=1)
            finally:
                words[STOP_WORD] = 1
            moved, went_back = map(int, watcher.communicate()[0].split())
        assert words[TAIL_WORD] == READS * len(RECORD)
        ring.close()
        ring.close()
    os.close(fd)
    assert moved > 0
    assert went_back == 0
