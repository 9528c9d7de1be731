"""The kernel's warning of repeats: off by default, at 2, 10, 100 and so on, and limited for each VM by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live import GuestProcess, open_guest_process

PARAMETER = Path("/sys/module/kvm/parameters/notify_window_warn")
LINE = re.compile(
    r"kvm: VM of pid (?P<pid>\d+), vCPU (?P<vcpu>\d+) \(tid (?P<tid>\d+)\): (?P<streak>\d+) Notify VM-Exits in a row "
    r"at RIP 0x(?P<rip>[0-9a-f]+), vectoring 0x(?P<vectoring>[0-9a-f]+), instruction (?P<insn>[0-9a-f ]+)$"
)
# KVM_NOTIFY_WARN_BURST in the patch.
BURST = 5
HIDE_RIP = 1

pytestmark = pytest.mark.usefixtures("injector")


class KernelLog:
    """Lines of the kernel's log from now on."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Returns the lines since the last call; AssertionError when the kernel overwrote some."""
        lines: list[str] = []
        while True:
            try:
                record = os.read(self.fd, 8192)
            except BlockingIOError:
                return lines
            lines.append(record.decode().split(";", 1)[1].split("\n", 1)[0])

    def read_warnings(self, guest: GuestProcess) -> list[dict[str, str]]:
        """Returns the fields of the warnings about one VM, of those since the last call."""
        found = [match.groupdict() for line in self.read() if (match := LINE.search(line))]
        return [fields for fields in found if fields["pid"] == str(guest.pid)]


@pytest.fixture
def log() -> Iterator[KernelLog]:
    opened = KernelLog()
    yield opened
    os.close(opened.fd)


@contextmanager
def warnings_on() -> Iterator[None]:
    PARAMETER.write_text("Y", encoding="ascii")
    try:
        yield
    finally:
        PARAMETER.write_text("N", encoding="ascii")


def make(guest: GuestProcess, **keys: int) -> int:
    guest.notify(0, **keys)
    return int(guest.wait_for("done")["code"])


def test_nothing_is_said_by_default(fresh: GuestProcess, log: KernelLog) -> None:
    make(fresh, exits=1000)
    assert [line for line in log.read() if "Notify VM-Exit" in line] == []


def test_a_streak_is_told_of_at_2_10_100(fresh: GuestProcess, log: KernelLog) -> None:
    with warnings_on():
        code = make(fresh, exits=999, vectoring=0x80000B11)
    warnings = log.read_warnings(fresh)
    assert [int(fields["streak"]) for fields in warnings] == [2, 10, 100]
    for fields in warnings:
        assert (int(fields["vcpu"]), int(fields["tid"])) == (fresh.vcpus[0].vcpu_id, fresh.vcpus[0].tid)
        assert (int(fields["rip"], 16), int(fields["vectoring"], 16)) == (code, 0x80000B11)
        assert fields["insn"].startswith("e6 75 ")


def test_what_has_no_rip_is_not_told_of(fresh: GuestProcess, log: KernelLog) -> None:
    with warnings_on():
        make(fresh, exits=1000, flags=HIDE_RIP)
        make(fresh, rounds=100, qualification=1)
    assert log.read_warnings(fresh) == []


def test_a_guest_that_provokes_warnings_hides_no_other(fresh: GuestProcess, log: KernelLog) -> None:
    with warnings_on(), open_guest_process(stats_fds=True) as other:
        make(fresh, exits=2, rips=2, rounds=20)
        assert [int(fields["streak"]) for fields in log.read_warnings(fresh)] == [2] * BURST
        make(other, exits=9)
        assert [int(fields["streak"]) for fields in log.read_warnings(other)] == [2]
        make(fresh, exits=1000)
        assert log.read_warnings(fresh) == []
