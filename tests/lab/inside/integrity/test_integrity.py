"""lockdown=integrity, as with Secure Boot: debugfs is closed for its writable files, the rest works."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab.inside.agent import find_per_vcpu, run_once
from tests.lab.inside.conftest import LOCKDOWN, UUID
from tests.lab.inside.kvm_readers import find_vm_directory, read_vcpu_statistics
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess


def test_the_boot_parameter_took_effect() -> None:
    assert "[integrity]" in LOCKDOWN.read_text(encoding="ascii")


@pytest.mark.parametrize("name", ["notify_window_exits", "exits"])
def test_counters_in_debugfs_are_refused_to_root(guest: GuestProcess, name: str) -> None:
    with pytest.raises(PermissionError):
        (find_vm_directory(guest) / name).read_text(encoding="ascii")


def test_read_only_files_in_debugfs_stay_readable(guest: GuestProcess) -> None:
    directory = find_vm_directory(guest)
    assert int((directory / "vcpu0" / "pid").read_text(encoding="ascii")) == guest.vcpus[0].tid
    assert (directory / "guest_mode").read_text(encoding="ascii").strip() == "0"


def test_stats_fds_work(guest: GuestProcess) -> None:
    before = read_vcpu_statistics(guest, guest.vcpus[0])["io_exits"]
    guest.run(23)
    assert read_vcpu_statistics(guest, guest.vcpus[0])["io_exits"] == before + 23


def test_tracepoints_work(guest: GuestProcess) -> None:
    with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, "exit_reason == 0x7b") as reader:
        guest.run(23)
        assert len(reader.read()) == 23


def test_the_agent_reads_stats_fds(guest: GuestProcess) -> None:
    text = run_once("--format=prometheus", "--collector.source=stats_fd")
    assert find_per_vcpu(text, "kvm_vcpu_notify_window_exits_total", f"{UUID}-{guest.pid}") == {"0": 0, "1": 0}
    exits = {str(vcpu.index): read_vcpu_statistics(guest, vcpu)["exits"] for vcpu in guest.vcpus}
    assert find_per_vcpu(text, "kvm_vcpu_exits_total", f"{UUID}-{guest.pid}") == exits


def test_a_module_without_signature_is_refused() -> None:
    """So the injector cannot be here, and what it makes is tested on a kernel that is not locked down."""
    done = subprocess.run(["insmod", "/lab/modules/notify_inject.ko"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "notify_inject" not in Path("/proc/modules").read_text(encoding="ascii")
