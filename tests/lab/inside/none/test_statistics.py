"""Everything else that KVM counts, on this kernel: what holds on the host's holds here, and debugfs agrees."""

from __future__ import annotations

from kvm.counters.debugfs import DebugfsSource
from kvm.statistics import StatScope
from tests.lab.inside.kvm_readers import DEBUGFS
from tests.live import GuestProcess
from tests.live.test_statistics import (
    PROC,
    WANTED,
    guest,
    name_values,
    read_fd,
    read_statistics,
    refuse_trouble,
    select_all,
    test_a_choice_is_read_as_it_is_in_the_whole,
    test_a_vm_has_every_statistic_that_its_stats_fd_describes,
    test_by_open_files_none_are_read_and_that_is_said,
    test_each_vcpu_has_every_statistic_that_its_stats_fd_describes,
    test_more_vcpus_than_there_was_room_for,
    test_of_a_running_guest_values_lie_between_two_reads_of_its_stats_fd,
    test_sums_are_those_of_all_vcpus,
    test_what_has_not_moved_is_the_same_object,
)

__all__ = [
    "guest",
    "test_a_choice_is_read_as_it_is_in_the_whole",
    "test_a_vm_has_every_statistic_that_its_stats_fd_describes",
    "test_by_open_files_none_are_read_and_that_is_said",
    "test_each_vcpu_has_every_statistic_that_its_stats_fd_describes",
    "test_more_vcpus_than_there_was_room_for",
    "test_of_a_running_guest_values_lie_between_two_reads_of_its_stats_fd",
    "test_sums_are_those_of_all_vcpus",
    "test_what_has_not_moved_is_the_same_object",
]


def test_debugfs_has_the_same_sums_and_values_of_the_vm(guest: GuestProcess) -> None:
    source = DebugfsSource(WANTED, DEBUGFS, PROC, refuse_trouble, selection=select_all(StatScope.VM))
    source.open()
    assert source.limits == ""
    statistics = read_statistics(source, guest)
    assert statistics.vm is not None
    assert statistics.vcpu_sums is not None
    own = {name: values for name, values in read_fd(guest, guest.vm_stats_fd)[1].items() if len(values) == 1}
    assert name_values(statistics.table.vm, statistics.vm) == own
    files = [read_fd(guest, vcpu.stats_fd)[1] for vcpu in guest.vcpus]
    summed = name_values(statistics.table.vcpu, statistics.vcpu_sums)
    assert summed == {name: (sum(values[name][0] for values in files),) for name in summed}
    assert {"exits", "halt_wait_ns", "irq_injections"} <= summed.keys()
