"""lockdown=confidentiality: tracefs is closed as well; stats fds and perf's tracepoints still work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.inside.agent import find_per_vcpu, run_once
from tests.lab.inside.conftest import LOCKDOWN, UUID
from tests.lab.inside.kvm_readers import find_vm_directory, read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess


@pytest.fixture(scope="module", autouse=True)
def locked_down() -> None:
    """Raises the state, which root may do at any time; it never falls again before the next boot."""
    if "[confidentiality]" not in LOCKDOWN.read_text(encoding="ascii"):
        LOCKDOWN.write_text("confidentiality", encoding="ascii")
    assert "[confidentiality]" in LOCKDOWN.read_text(encoding="ascii")


def test_the_trace_file_is_refused_to_root() -> None:
    with pytest.raises(PermissionError):
        Path("/sys/kernel/tracing/trace").read_text(encoding="ascii")


def test_tracepoints_still_work_through_perf(guest: GuestProcess) -> None:
    """perf_event_open asks LOCKDOWN_PERF only for registers of the kernel; `id` and `format` are not closed either."""
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, "exit_reason == 0x7b") as reader:
        guest.run(23)
        assert len(reader.read()) == 23


def test_counters_in_debugfs_are_refused_to_root(guest: GuestProcess) -> None:
    with pytest.raises(PermissionError):
        (find_vm_directory(guest) / "notify_window_exits").read_text(encoding="ascii")


def test_stats_fds_work(guest: GuestProcess) -> None:
    before = read_vcpu_statistics(guest, guest.vcpus[0])["io_exits"]
    guest.run(23)
    assert read_vcpu_statistics(guest, guest.vcpus[0])["io_exits"] == before + 23


def test_the_agent_reads_stats_fds(guest: GuestProcess) -> None:
    text = run_once("--format=prometheus")
    assert find_per_vcpu(text, "kvm_vcpu_notify_window_exits_total", f"{UUID}-{guest.pid}") == {"0": 0, "1": 0}
