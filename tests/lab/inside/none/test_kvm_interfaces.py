"""The interfaces that the project reads, as these kernels have them: debugfs, stats fds, uevents."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab.inside.kvm_readers import (
    DEBUGFS,
    find_vm_directory,
    open_uevents,
    read_kvm_uevent,
    read_vcpu_statistics,
    read_vm_statistic,
)
from tests.live import GuestProcess, open_guest_process


def sum_over_vcpus(guest: GuestProcess, name: str) -> int:
    return sum(read_vcpu_statistics(guest, vcpu)[name] for vcpu in guest.vcpus)


def test_the_kernel_is_not_locked_down() -> None:
    assert "[none]" in Path("/sys/kernel/security/lockdown").read_text(encoding="ascii")


def test_a_vcpu_names_the_thread_that_runs_it(guest: GuestProcess) -> None:
    pids = {
        vcpu.vcpu_id: int((find_vm_directory(guest) / f"vcpu{vcpu.vcpu_id}" / "pid").read_text(encoding="ascii"))
        for vcpu in guest.vcpus
    }
    assert pids == {vcpu.vcpu_id: vcpu.tid for vcpu in guest.vcpus}


def test_vcpu_threads_have_their_names(guest: GuestProcess) -> None:
    names = [Path(f"/proc/{guest.pid}/task/{vcpu.tid}/comm").read_text(encoding="ascii") for vcpu in guest.vcpus]
    assert names == ["CPU 0/KVM\n", "CPU 1/KVM\n"]


def test_the_vmm_holds_a_stats_fd_for_each_vcpu(guest: GuestProcess) -> None:
    links = [os.readlink(f"/proc/{guest.pid}/fd/{vcpu.stats_fd}") for vcpu in guest.vcpus]
    assert links == [f"anon_inode:kvm-vcpu-stats:{vcpu.vcpu_id}" for vcpu in guest.vcpus]


def test_port_writes_are_counted_exactly(guest: GuestProcess) -> None:
    before = [read_vcpu_statistics(guest, vcpu)["io_exits"] for vcpu in guest.vcpus]
    guest.run(1000)
    after = [read_vcpu_statistics(guest, vcpu)["io_exits"] for vcpu in guest.vcpus]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1000, 1000]


def test_sums_are_equal_to_their_parts(guest: GuestProcess, injector: None) -> None:
    before = int((DEBUGFS / "notify_window_exits").read_text(encoding="ascii"))
    with open_guest_process(vcpus=1, stats_fds=True) as other:
        guest.notify(0, exits=30)
        guest.notify(1, exits=12)
        other.notify(0, exits=7)
        for which in (guest, guest, other):
            which.wait_for("done")
        for name in ("notify_window_exits", "exits", "io_exits"):
            assert read_vm_statistic(guest, name) == sum_over_vcpus(guest, name)
            assert read_vm_statistic(other, name) == sum_over_vcpus(other, name)
        assert read_vm_statistic(other, "notify_window_exits") == 7
        assert int((DEBUGFS / "notify_window_exits").read_text(encoding="ascii")) == before + 49


def test_a_zero_written_to_debugfs_resets_every_vcpu(guest: GuestProcess, injector: None) -> None:
    guest.notify(0, exits=3)
    guest.notify(1, exits=4)
    guest.wait_for("done")
    guest.wait_for("done")
    assert read_vm_statistic(guest, "notify_window_exits") >= 7
    (find_vm_directory(guest) / "notify_window_exits").write_text("0", encoding="ascii")
    assert [read_vcpu_statistics(guest, vcpu)["notify_window_exits"] for vcpu in guest.vcpus] == [0, 0]
    guest.notify(1, exits=2)
    guest.wait_for("done")
    assert [read_vcpu_statistics(guest, vcpu)["notify_window_exits"] for vcpu in guest.vcpus] == [0, 2]


def test_the_kernel_announces_a_vm_and_its_end() -> None:
    with open_uevents() as uevents:
        with open_guest_process() as guest:
            created = read_kvm_uevent(uevents, "create", guest.creator_tid)
            assert created["STATS_PATH"] == f"/kvm/{guest.creator_tid}-{guest.vm_fd}"
            assert find_vm_directory(guest).is_dir()
        destroyed = read_kvm_uevent(uevents, "destroy", guest.creator_tid)
        assert destroyed["STATS_PATH"] == created["STATS_PATH"]
    assert not find_vm_directory(guest).exists()
