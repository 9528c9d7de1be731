"""Which vCPU a call is from: found at the same cost however the vCPUs are spread over VMs, or waited for, or lost."""

from __future__ import annotations

from exporter.monitor.thread_index import STRANGER_SECONDS, UNPLACED_CALLS, ThreadIndex
from kvm.bpf.notify_trigger import NotifyCall
from kvm.model import Snapshot
from tests.fake_host import FakeVm
from tests.snapshots import make_snapshot


def snap(*vms: FakeVm) -> Snapshot:
    return make_snapshot(*(vm.read() for vm in vms))


def call(vm: FakeVm, number: int, pid: int | None = None) -> NotifyCall:
    return NotifyCall(1, vm.key.pid if pid is None else pid, vm.vcpus[number].tid, 2 * number)


def test_each_vcpu_of_two_vms_of_one_process_is_found() -> None:
    vms = [FakeVm("web", 100, 3), FakeVm("db", 100, 2, vm_fd=50)]
    index = ThreadIndex()
    index.observe(snap(*vms), 0.0)
    for vm in vms:
        for number in range(len(vm.vcpus)):
            found = index.find(call(vm, number))
            assert found is not None
            assert (found.reading.vm.key, found.vcpu.index) == (vm.key, number)


def test_a_tid_under_another_pid_or_vcpu_id_is_not_found() -> None:
    vm = FakeVm("web", 100, 2)
    index = ThreadIndex()
    index.observe(snap(vm), 0.0)
    assert index.find(call(vm, 0, pid=101)) is None
    assert index.find(NotifyCall(1, 100, vm.vcpus[0].tid, 2)) is None


def test_what_a_newer_snapshot_does_not_have_is_not_found() -> None:
    vm = FakeVm("web", 100, 2)
    index = ThreadIndex()
    index.observe(snap(vm), 0.0)
    assert index.find(call(vm, 1)) is not None
    index.observe(snap(), 1.0)
    assert index.find(call(vm, 1)) is None


def test_it_tells_whether_a_snapshot_has_the_same_vcpus() -> None:
    vm, other = FakeVm("web", 100, 2), FakeVm("db", 200, 1)
    index = ThreadIndex()
    shapes = [(vm,), (vm,), (vm, other), (vm, other), (other,), ()]
    same = []
    for seconds, shape in enumerate(shapes):
        index.observe(snap(*shape), seconds)
        same.append(index.is_same)
    assert same == [False, True, False, True, False, False]
    index.observe(snap(vm), 10.0)
    vm.vcpus[0].tid += 1
    index.observe(snap(vm), 11.0)
    assert not index.is_same


def test_a_call_waits_for_the_next_snapshot_and_a_stranger_is_ignored_for_a_while() -> None:
    vm = FakeVm("late", 300, 1)
    index = ThreadIndex()
    assert index.defer(call(vm, 0), 0.0)
    assert index.observe(snap(), 1.0) == []
    assert index.lost == 1
    assert not index.defer(call(vm, 0), 2.0)
    assert index.lost == 2
    assert index.defer(call(vm, 0), 1.0 + STRANGER_SECONDS)
    (found,) = index.observe(snap(vm), 40.0)
    assert found.reading.vm.key == vm.key
    assert index.lost == 2


def test_only_so_many_calls_wait() -> None:
    vm = FakeVm("late", 300, UNPLACED_CALLS + 5)
    index = ThreadIndex()
    kept = [index.defer(call(vm, number), 0.0) for number in range(len(vm.vcpus))]
    assert (sum(kept), index.lost) == (UNPLACED_CALLS, 5)
