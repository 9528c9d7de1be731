"""The eBPF source and trigger where KVM is a module: its types come from the module's own BTF."""

from __future__ import annotations

import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from kvm.bpf.notify_trigger import NotifyCall, NotifyTrigger
from kvm.counters.bpf import BpfSource
from kvm.model import VmKey
from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.live import GuestProcess, open_guest_process
from tests.verifier_bill import MOST, read_bill
from tests.waiting import wait_until

RUN = "kvm_arch_vcpu_ioctl_run"
KVM_EXIT_IO, KVM_EXIT_IO_OUT = 2, 1
AGAIN_SECONDS = 0.1
RETRY_SECONDS = 0.05  # RETRY_NS of notify.bpf.c
PATIENCE_SECONDS = 60.0
EXITS_AT_ONCE = 20


@pytest.fixture(scope="module")
def source() -> Iterator[BpfSource]:
    source = BpfSource(("exits", "notify_window_exits", "io_exits"))
    source.open()
    yield source
    source.close()


def find_key(source: BpfSource, guest: GuestProcess) -> VmKey:
    (key,) = (key for key in source.read() if key.pid == guest.pid)
    return key


def test_vms_are_found_by_kvms_own_list(source: BpfSource) -> None:
    assert (source.method, source.method_reason) == ("list", "")


def test_counters_are_those_of_the_statistics_fds(source: BpfSource, guest: GuestProcess) -> None:
    guest.run(23)
    (counters,) = (counters for key, counters in source.read().items() if key.pid == guest.pid)
    assert counters.vcpu_ids == tuple(vcpu.vcpu_id for vcpu in guest.vcpus)
    assert counters.tids == tuple(vcpu.tid for vcpu in guest.vcpus)
    statistics = [read_vcpu_statistics(guest, vcpu) for vcpu in guest.vcpus]
    assert counters.per_vcpu == {name: tuple(s[name] for s in statistics) for name in counters.per_vcpu}
    assert set(counters.per_vcpu) == {"exits", "notify_window_exits", "io_exits"}
    assert (counters.notify_window_cycles, counters.notify_flags) == (0, 0)


def test_both_ways_to_find_vms_agree(source: BpfSource, guest: GuestProcess) -> None:
    sure = BpfSource(("exits", "notify_window_exits", "io_exits"), with_list=False)
    sure.open()
    try:
        assert sure.method == "files"
        assert sure.read() == source.read() != {}
    finally:
        sure.close()


def test_registers_are_those_that_the_guest_ended_with(source: BpfSource, guest: GuestProcess) -> None:
    key = find_key(source, guest)
    for vcpu, done in zip(guest.vcpus, sorted(guest.run(5), key=lambda done: done["vcpu"]), strict=True):
        state = source.read_vcpu(key, vcpu.vcpu_id)
        assert state is not None
        assert state.stale == frozenset()
        assert state.registers == {name: done["registers"][name] for name in state.registers}
        assert (state.tid, state.guest_mode) == (vcpu.tid, False)
        assert state.state_protected is False
        assert state.vm_type in (0, None)  # None before Linux 6.8
        assert {name: v[0] for name, v in state.statistics.items()} == read_vcpu_statistics(guest, vcpu)


def test_the_verifier_has_little_to_do(tell: Callable[[str], None]) -> None:
    bill = dict(read_bill(RUN))
    tell(f"verified instructions: {bill}")
    assert max(bill.values()) <= MOST


@pytest.mark.usefixtures("injector")
def test_injected_notify_exits_are_counted(source: BpfSource, guest: GuestProcess) -> None:
    key = find_key(source, guest)
    before = source.read()[key].per_vcpu["notify_window_exits"]
    guest.notify(1, exits=7)
    guest.wait_for("done")
    assert source.read()[key].per_vcpu["notify_window_exits"] == (before[0], before[1] + 7)


def test_the_trigger_tells_of_each_thread_at_once_and_then_seldom_and_counts_all() -> None:
    calls: list[NotifyCall] = []
    trigger = NotifyTrigger(
        calls.append, function=RUN, again_seconds=AGAIN_SECONDS, exit_reason=KVM_EXIT_IO, flags=KVM_EXIT_IO_OUT
    )
    assert trigger.open().attached
    try:
        with open_guest_process(vcpus=2, port_writes=1) as guest:
            guest.run(499)
            time.sleep(AGAIN_SECONDS)  # after which each thread is told of again
            guest.run(500)
            assert select.select([trigger.fd], [], [], 10)[0]
            trigger.deliver()
            ours = [call for call in calls if call.pid == guest.pid]
            assert {(call.tid, call.vcpu_id) for call in ours} == {(v.tid, v.vcpu_id) for v in guest.vcpus}
            for vcpu in guest.vcpus:
                times = [call.time_ns for call in ours if call.tid == vcpu.tid]
                assert times == sorted(times)
                assert len(times) >= 2
                assert all(later - sooner >= AGAIN_SECONDS * 1e9 for sooner, later in pairwise(times))
            counts = {thread[2:]: count for thread, count in trigger.read_context_invalid().items()}
            assert counts == {(vcpu.tid, vcpu.vcpu_id): 1000 for vcpu in guest.vcpus}
        threads = list(trigger.read_context_invalid())
        assert {thread.pid for thread in threads} == {guest.pid}
        trigger.forget({(guest.pid + 1, threads[0].start_ticks), (guest.pid, threads[0].start_ticks + 1)})
        assert list(trigger.read_context_invalid()) == threads
        trigger.forget({threads[0]})
        assert list(trigger.read_context_invalid()) == threads[1:]
        trigger.forget({threads[0][:2]})
        assert trigger.read_context_invalid() == {}
        assert trigger.lost == (0, 0)
    finally:
        trigger.close()


def count_exits(trigger: NotifyTrigger) -> int:
    return sum(trigger.read_context_invalid().values())


def test_what_finds_no_room_is_tried_again_seldom_and_counted() -> None:
    trigger = NotifyTrigger(
        lambda call: None,
        function=RUN,
        again_seconds=RETRY_SECONDS,  # the least: the ring is full the sooner
        ring_bytes=mmap.PAGESIZE,
        exit_reason=KVM_EXIT_IO,
        flags=KVM_EXIT_IO_OUT,
    )
    assert trigger.open().attached
    try:
        # A few exits at a time: where each emulated CPU has a thread of its own, guests that flood lose their way.
        with open_guest_process(vcpus=2) as guest:

            def lose(least: int) -> bool:
                guest.run(EXITS_AT_ONCE)
                return trigger.lost[0] >= least

            def receive() -> int:
                guest.run(EXITS_AT_ONCE)
                return trigger.deliver()

            wait_until(lambda: lose(1), "the ring has no room", PATIENCE_SECONDS)
            began, lost, exits = time.monotonic(), trigger.lost[0], count_exits(trigger)
            wait_until(lambda: lose(lost + 4), "it is tried again", PATIENCE_SECONDS)
            guest.run(500)
            assert count_exits(trigger) >= exits + 1000
            lost = trigger.lost[0] - lost
            assert lost <= 2 * ((time.monotonic() - began) / RETRY_SECONDS + 1)
            assert lost < count_exits(trigger) - exits
            assert trigger.deliver()
            wait_until(receive, "there is room again", PATIENCE_SECONDS)
    finally:
        trigger.close()


def test_counts_may_be_read_while_the_trigger_is_opened_and_closed() -> None:
    trigger = NotifyTrigger(lambda call: None, function=RUN)
    done = threading.Event()

    def read() -> int:
        reads = 0
        while not done.is_set():
            assert (trigger.read_context_invalid(), trigger.lost) == ({}, (0, 0))
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as workers:
        readers = [workers.submit(read) for _ in range(2)]
        try:
            for _ in range(5):
                assert trigger.open().attached
                trigger.close()
        finally:
            done.set()
        assert all(reader.result() for reader in readers)


def test_where_there_is_no_such_function_that_is_a_fact() -> None:
    trigger = NotifyTrigger(lambda call: None)
    status = trigger.open()
    assert not status.attached
    assert status.reason == "no module of this kernel has handle_notify"
    trigger.close()


def test_searching_all_modules_in_vain_leaves_no_fd_of_theirs() -> None:
    trigger = NotifyTrigger(lambda call: None, kallsyms=Path("/dev/null"))
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert not trigger.open().attached
    trigger.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
