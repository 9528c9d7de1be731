"""Everything else that KVM counts, of real guests: each source reads and types it as KVM's own stats fds do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvm import syscalls
from kvm.binary_stats import Statistic
from kvm.counters.bpf import BpfSource
from kvm.counters.debugfs import DebugfsSource
from kvm.counters.source import CounterSource
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.vm_discovery import Discovery
from kvm.host.throwaway_vm import read_descriptors, read_values
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, VmCounters
from kvm.read_errors import Subject
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatSelection, StatUnit, VmStatistics, cut_values
from tests.live import GuestProcess, open_guest_process

pytestmark = pytest.mark.live

PROC = Path("/proc")
WANTED = (NOTIFY_WINDOW_EXITS, EXITS)
# As in include/uapi/linux/kvm.h, written down once more: this is what the sources are held to.
KINDS = [StatKind.CUMULATIVE, StatKind.INSTANT, StatKind.PEAK, StatKind.LINEAR_HISTOGRAM, StatKind.LOG_HISTOGRAM]
UNITS = [StatUnit.NONE, StatUnit.BYTES, StatUnit.SECONDS, StatUnit.CYCLES, StatUnit.BOOLEAN]


def refuse_trouble(whose: Subject, kind: str, message: str) -> None:
    raise AssertionError((whose, kind, message))


def select_all(level: StatScope, pattern: str = "") -> StatSelection:
    return StatSelection(level, lambda key: re.search(pattern, key) is not None)


MAKERS: dict[str, Callable[[StatSelection], CounterSource]] = {
    "bpf": lambda selection: BpfSource(WANTED, selection=selection),
    "bpf by helper": lambda selection: BpfSource(WANTED, selection=selection, fast_objects=()),
    "stats_fd": lambda selection: StatsFdSource(WANTED, refuse_trouble, selection=selection),
}


@contextmanager
def open_source(name: str, selection: StatSelection) -> Iterator[CounterSource]:
    source = MAKERS[name](selection)
    source.open()
    try:
        yield source
    finally:
        source.close()


def read_counters(source: CounterSource, guest: GuestProcess) -> VmCounters:
    discovery = Discovery(PROC, lambda _pid, _kind, _message: None)
    try:
        held = [vm for vm in discovery.find_vms() if vm.key.pid == guest.pid]
        ((_, counters),) = [(key, counters) for key, counters in source.read(held).items() if key.pid == guest.pid]
        return counters
    finally:
        discovery.close()


def read_statistics(source: CounterSource, guest: GuestProcess) -> VmStatistics:
    statistics = read_counters(source, guest).statistics
    assert statistics is not None
    return statistics


@contextmanager
def borrow(guest: GuestProcess, fd: int) -> Iterator[int]:
    pidfd = os.pidfd_open(guest.pid)
    borrowed = syscalls.pidfd_getfd(pidfd, fd)
    os.close(pidfd)
    try:
        yield borrowed
    finally:
        os.close(borrowed)


def read_fd(guest: GuestProcess, fd: int) -> tuple[dict[str, Statistic], dict[str, tuple[int, ...]]]:
    """What KVM_GET_STATS_FD itself describes, and the values."""
    with borrow(guest, fd) as borrowed:
        described = read_descriptors(borrowed)
        return described, read_values(borrowed, described)


def describe(scope: StatScope, raw: Statistic) -> StatDescriptor:
    kind, unit = KINDS[raw.flags & 15], UNITS[raw.flags >> 4 & 15]
    base = [10, 2][raw.flags >> 8 & 15]
    return StatDescriptor(scope, raw.name, kind, unit, base, raw.exponent, raw.size, raw.bucket_size)


def name_values(descriptors: tuple[StatDescriptor, ...], values: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {descriptor.name: tuple(cut) for descriptor, cut in cut_values(descriptors, values)}


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestProcess]:
    """A guest at rest, that has run."""
    with open_guest_process(vcpus=3, vcpu_ids=[0, 4, 2], stats_fds=True, vm_stats_fd=True, port_writes=23) as guest:
        guest.run(500)
        yield guest


@pytest.mark.parametrize("name", list(MAKERS))
def test_each_vcpu_has_every_statistic_that_its_stats_fd_describes(name: str, guest: GuestProcess) -> None:
    with open_source(name, select_all(StatScope.VCPU)) as source:
        counters = read_counters(source, guest)
        statistics = counters.statistics
    assert statistics is not None
    assert statistics.table.left_out == ()
    assert statistics.vcpu_columns is not None
    for vcpu in guest.vcpus:
        described, values = read_fd(guest, vcpu.stats_fd)
        position = counters.vcpu_ids.index(vcpu.vcpu_id)
        assert set(statistics.table.vcpu) == {describe(StatScope.VCPU, raw) for raw in described.values()}
        row = tuple(column[position] for column in statistics.vcpu_columns)
        assert name_values(statistics.table.vcpu, row) == values
        assert values["exits"][0] > 500


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("level", StatScope)
def test_a_vm_has_every_statistic_that_its_stats_fd_describes(name: str, level: StatScope, guest: GuestProcess) -> None:
    with open_source(name, select_all(level)) as source:
        statistics = read_statistics(source, guest)
    described, values = read_fd(guest, guest.vm_stats_fd)
    assert set(statistics.table.vm) == {describe(StatScope.VM, raw) for raw in described.values()}
    assert statistics.vm is not None
    assert name_values(statistics.table.vm, statistics.vm) == values


@pytest.mark.parametrize("name", list(MAKERS))
def test_sums_are_those_of_all_vcpus(name: str, guest: GuestProcess) -> None:
    with open_source(name, select_all(StatScope.VM)) as source:
        statistics = read_statistics(source, guest)
    files = [read_fd(guest, vcpu.stats_fd) for vcpu in guest.vcpus]
    assert statistics.vcpu_sums is not None
    summed = name_values(statistics.table.vcpu, statistics.vcpu_sums)
    cumulative = {
        raw.name for raw in files[0][0].values() if KINDS[raw.flags & 15] not in (StatKind.INSTANT, StatKind.PEAK)
    }
    assert summed.keys() == cumulative
    assert summed == {
        name: tuple(map(sum, zip(*(values[name] for _, values in files), strict=True))) for name in cumulative
    }
    assert statistics.vcpu_columns is None


def test_debugfs_has_the_sums_and_the_vms_own(guest: GuestProcess, tmp_path: Path) -> None:
    """The kernel that runs gives the types, and stats fds the values, as files: under lockdown debugfs is closed."""
    own = read_fd(guest, guest.vm_stats_fd)[1]
    files = [read_fd(guest, vcpu.stats_fd)[1] for vcpu in guest.vcpus]
    totals = own | {name: (sum(values[name][0] for values in files),) for name in files[0]}
    discovery = Discovery(PROC, lambda _pid, _kind, _message: None)
    (vm,) = [vm for vm in discovery.find_vms() if vm.key.pid == guest.pid]
    discovery.close()
    directory = tmp_path / f"{vm.key.pid}-{vm.key.vm_fd}"
    directory.mkdir()
    for name, (value, *_) in totals.items():
        (tmp_path / name).write_text("0\n")
        (directory / name).write_text(f"{value}\n")
    (tmp_path / "hypercalls").unlink()  # what has no file is absent
    source = DebugfsSource(WANTED, tmp_path, PROC, refuse_trouble, selection=select_all(StatScope.VM))
    source.open()
    statistics = source.read([vm])[vm.key].statistics
    assert (source.limits, statistics is not None) == ("", True)
    assert statistics is not None
    assert statistics.vm is not None
    assert statistics.vcpu_sums is not None
    assert name_values(statistics.table.vm, statistics.vm) == own
    summed = name_values(statistics.table.vcpu, statistics.vcpu_sums)
    scalar = {one.name for one in statistics.table.vcpu}
    assert summed == {name: totals[name] for name in scalar}
    assert scalar >= {"exits", "halt_wait_ns"}
    assert not scalar & {"hypercalls", "halt_wait_hist", "guest_mode"}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_vm_of_more_vcpus_than_are_summed_at_once(name: str) -> None:
    with open_guest_process(vcpus=70, stats_fds=True, port_writes=5) as guest:
        with open_source(name, select_all(StatScope.VM)) as source:
            statistics = read_statistics(source, guest)
        files = [read_fd(guest, vcpu.stats_fd)[1] for vcpu in guest.vcpus]
    assert statistics.vcpu_sums is not None
    for stat, summed in name_values(statistics.table.vcpu, statistics.vcpu_sums).items():
        assert summed == tuple(map(sum, zip(*(values[stat] for values in files), strict=True))), stat


@pytest.mark.parametrize("name", list(MAKERS))
def test_of_a_running_guest_values_lie_between_two_reads_of_its_stats_fd(name: str) -> None:
    with open_guest_process(vcpus=2, stats_fds=True) as guest, open_source(name, select_all(StatScope.VM)) as source:
        guest.send("loop")
        before = [read_fd(guest, vcpu.stats_fd)[1] for vcpu in guest.vcpus]
        statistics = read_statistics(source, guest)
        after = [read_fd(guest, vcpu.stats_fd)[1] for vcpu in guest.vcpus]
        guest.stop()
    assert statistics.vcpu_sums is not None
    for stat, read in name_values(statistics.table.vcpu, statistics.vcpu_sums).items():
        least = [sum(values[stat][bucket] for values in before) for bucket in range(len(read))]
        most = [sum(values[stat][bucket] for values in after) for bucket in range(len(read))]
        assert all(low <= value <= high for low, value, high in zip(least, read, most, strict=True)), stat
    exits = name_values(statistics.table.vcpu, statistics.vcpu_sums)["exits"][0]
    assert exits > sum(values["exits"][0] for values in before)


@pytest.mark.parametrize("name", list(MAKERS))
def test_without_a_selection_nothing_is_read(name: str, guest: GuestProcess) -> None:
    with open_source(name, select_all(StatScope.VM, "^nothing$")) as source:
        statistics = read_counters(source, guest).statistics
    assert statistics is None or (statistics.vm, statistics.vcpu_sums, statistics.vcpu_columns) == (None, None, None)


def test_a_choice_is_read_as_it_is_in_the_whole(guest: GuestProcess) -> None:
    chosen: dict[str, Mapping[str, tuple[int, ...]]] = {}
    for pattern in ("", "^vcpu/(halt_wait_hist|exits)$"):
        with open_source("bpf", select_all(StatScope.VM, pattern)) as source:
            statistics = read_statistics(source, guest)
        assert statistics.vcpu_sums is not None
        chosen[pattern] = name_values(statistics.table.vcpu, statistics.vcpu_sums)
    whole, part = chosen.values()
    assert part.keys() == {"halt_wait_hist", "exits"}
    assert part == {name: whole[name] for name in part}


def test_what_has_not_moved_is_the_same_object(guest: GuestProcess) -> None:
    with open_source("bpf", select_all(StatScope.VCPU)) as source:
        one, other = read_counters(source, guest), read_counters(source, guest)
        assert one is other
        guest.run(1)
        moved = read_counters(source, guest)
    assert moved.statistics is not None
    assert moved.statistics != one.statistics


@pytest.mark.parametrize("level", StatScope)
def test_more_vcpus_than_there_was_room_for(level: StatScope, guest: GuestProcess) -> None:
    source = BpfSource(WANTED, selection=select_all(level), capacity=2)
    source.open()
    try:
        statistics = read_statistics(source, guest)
    finally:
        source.close()
    with open_source("bpf", select_all(level)) as roomy:
        assert statistics == read_statistics(roomy, guest)


def test_by_open_files_none_are_read_and_that_is_said(guest: GuestProcess) -> None:
    source = BpfSource(WANTED, selection=select_all(StatScope.VM), with_list=False)
    source.open()
    try:
        assert read_counters(source, guest).statistics is None
        assert "without the statistics of --collector.stats" in source.limits
    finally:
        source.close()
