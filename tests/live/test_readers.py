"""Discovery, stats fds and debugfs on real VMs of /dev/kvm, made by our own tiny guest."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvm import abi
from kvm.counters.debugfs import DebugfsSource, find_vcpu_ids, find_vm_directory, read_vcpu_tids
from kvm.counters.stats_fd import StatsFdSource
from kvm.discovery.uevents import open_uevents, parse_uevent, read_uevent
from kvm.discovery.vm_discovery import Discovery, HeldVm
from kvm.errors import SourceUnavailable
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, VmKey
from kvm.read_errors import Subject
from tests.live import OTHER_EXITS, open_guest_process

pytestmark = pytest.mark.live

PROC, KVM_DEBUGFS = Path("/proc"), Path("/sys/kernel/debug/kvm")
WANTED = (NOTIFY_WINDOW_EXITS, EXITS)
PORT_WRITES = 23


def refuse_trouble(whose: Subject, kind: str, message: str) -> None:
    raise AssertionError((whose, kind, message))


@pytest.fixture
def discovery() -> Iterator[Discovery]:
    found = Discovery(PROC, lambda _pid, _kind, _message: None)  # other tests' VMs may be odd on purpose
    yield found
    found.close()


@pytest.fixture
def stats_fd() -> StatsFdSource:
    source = StatsFdSource(WANTED, refuse_trouble)
    source.open()
    return source


def find_held(discovery: Discovery, pid: int) -> list[HeldVm]:
    return [vm for vm in discovery.find_vms() if vm.key.pid == pid]


def test_a_known_number_of_port_writes_is_counted(discovery: Discovery, stats_fd: StatsFdSource) -> None:
    """Each port write is an exit. With SVM nested page faults count too."""
    few = OTHER_EXITS if Path("/sys/module/kvm_pvm").exists() else 10_000
    with open_guest_process(vcpus=3, stats_fds=True, port_writes=PORT_WRITES) as guest:
        (vm,) = find_held(discovery, guest.pid)
        assert vm.vcpu_ids == (0, 1, 2)
        assert vm.key.vm_fd == guest.vm_fd
        before = stats_fd.read([vm])[vm.key]
        assert before.vcpu_ids == (0, 1, 2)
        assert all(PORT_WRITES <= exits <= PORT_WRITES + few for exits in before.per_vcpu[EXITS])
        assert before.per_vcpu[NOTIFY_WINDOW_EXITS] == (0, 0, 0)
        guest.run(1000)
        after = stats_fd.read([vm])[vm.key].per_vcpu[EXITS]
        assert all(1000 <= now - then <= 1000 + few for now, then in zip(after, before.per_vcpu[EXITS], strict=True))


def test_threads_are_those_that_run_the_vcpus(discovery: Discovery) -> None:
    with open_guest_process(vcpus=2, vcpu_ids=[0, 5], port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        directory = find_vm_directory(KVM_DEBUGFS, PROC, vm.key)
        assert directory is not None
        assert find_vcpu_ids(directory) == (0, 5)
        assert read_vcpu_tids(directory) == {vcpu.vcpu_id: vcpu.tid for vcpu in guest.vcpus}


def test_a_vmm_without_statistics_fds_is_listed_and_says_why(discovery: Discovery, stats_fd: StatsFdSource) -> None:
    with open_guest_process(vcpus=2, style="firecracker", name="fc", port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        counters = stats_fd.read([vm])[vm.key]
        assert vm.vcpu_ids == (0, 1)
        assert counters.per_vcpu == {}
        assert "holds no stats fds" in counters.problem


def test_a_vm_killed_while_it_is_known_has_no_entry_and_is_not_kept_alive(
    discovery: Discovery, stats_fd: StatsFdSource
) -> None:
    with open_guest_process(vcpus=2, stats_fds=True, port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        directory = find_vm_directory(KVM_DEBUGFS, PROC, vm.key)
        assert directory is not None
        assert vm.key in stats_fd.read([vm])
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait()
        assert stats_fd.read([vm]) == {}
        assert not directory.exists()
    assert find_held(discovery, guest.pid) == []


def test_an_fd_that_holds_another_file_by_now_is_no_counter(discovery: Discovery) -> None:
    troubles: list[str] = []
    source = StatsFdSource(WANTED, lambda _pid, kind, _message: troubles.append(kind))
    source.open()
    with open_guest_process(stats_fds=True, port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        swapped = HeldVm(vm.key, vm.tid, vm.pidfd, vm.vcpu_ids, {0: guest.vcpus[0].fd})
        counters = source.read([swapped])[vm.key]
        assert counters.per_vcpu == {}
        assert "another file" in counters.problem
        assert troubles == ["malformed"]
        assert source.read([vm])[vm.key].per_vcpu[EXITS]
        forged = HeldVm(vm.key, vm.tid, vm.pidfd, vm.vcpu_ids, {0: 0})  # the guest's standard input, a pipe
        assert "another file" in source.read([forged])[vm.key].problem


def test_a_file_that_takes_the_place_of_a_known_one_is_no_counter() -> None:
    """Another vCPU's statistics, a file with the same bytes, and an anonymous one that is open for writing."""
    troubles: list[str] = []
    source = StatsFdSource(WANTED, lambda _pid, _kind, message: troubles.append(message))
    source.open()
    kvm = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(kvm, abi.KVM_CREATE_VM, 0)
    vcpus = [fcntl.ioctl(vm, abi.KVM_CREATE_VCPU, vcpu_id) for vcpu_id in range(2)]
    stats = [fcntl.ioctl(vcpu, abi.KVM_GET_STATS_FD, 0) for vcpu in vcpus]
    with tempfile.TemporaryFile() as file:
        file.write(os.pread(stats[0], 1 << 16, 0))
        file.flush()
        copy = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        pidfd = os.pidfd_open(os.getpid())
        known, *strangers = (
            HeldVm(VmKey(os.getpid(), 1, 1), os.getpid(), pidfd, (0,), {0: fd})
            for fd in (stats[0], stats[1], copy, vcpus[0])
        )
        assert source.read([known])[known.key].per_vcpu[EXITS] == (0,)
        for stranger in strangers:
            assert source.read([stranger])[known.key].per_vcpu == {}
            assert source.read([known])[known.key].per_vcpu[EXITS] == (0,)
    for fd in (copy, pidfd, *stats, *vcpus, vm, kvm):
        os.close(fd)
    assert troubles
    assert all("another file" in message for message in troubles)


def test_a_process_with_several_vms_is_told_apart_and_its_vcpus_are_not_guessed(discovery: Discovery) -> None:
    code = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vms = [fcntl.ioctl(kvm, 0xAE01, 0) for _ in range(2)]
vcpus = [fcntl.ioctl(vm, 0xAE41, 0) for vm in vms]
again = os.dup(vms[0])
print(*vms, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    vm_fds = [int(word) for word in process.stdout.readline().split()]
    found = find_held(discovery, process.pid)
    process.communicate()
    assert [(vm.key.vm_fd, vm.vcpu_ids) for vm in found] == [(fd, None) for fd in vm_fds]


def test_a_forked_child_that_still_holds_its_parents_vm_is_no_vm(discovery: Discovery) -> None:
    code = """
import fcntl, os, signal, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.read()
os.kill(child, signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    held = [vm.key.pid for vm in discovery.find_vms() if vm.key.pid in (process.pid, child)]
    process.communicate()
    assert held == [process.pid]


def test_a_vm_whose_leader_thread_has_exited_is_found(discovery: Discovery) -> None:
    code = """
import ctypes, fcntl, os, sys, threading
def hold():
    kvm = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(kvm, 0xAE01, 0)
    vcpu = fcntl.ioctl(vm, 0xAE41, 0)
    while open(f"/proc/{os.getpid()}/stat").read().rpartition(")")[2].split()[0] != "Z":
        os.sched_yield()
    os.write(1, b"leader gone\\n")
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=hold).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"leader gone\n"
    assert os.listdir(f"/proc/{process.pid}/task") != [str(process.pid)]
    (vm,) = find_held(discovery, process.pid)
    process.communicate(b"x")
    assert vm.tid != process.pid
    assert vm.vcpu_ids == (0,)


def test_the_kernel_tells_of_a_new_vm() -> None:
    with open_uevents() as netlink:
        netlink.setblocking(True)
        netlink.settimeout(30)
        with open_guest_process() as guest:
            while (tid := parse_uevent(read_uevent(netlink))) != guest.creator_tid:
                assert tid is None or tid != guest.pid


def test_single_vcpus_are_read_where_kvm_tells_more_than_counters_do(
    discovery: Discovery, stats_fd: StatsFdSource
) -> None:
    """On a KVM without the patches: that it says so, and, as if it had them, that what it has is read right."""
    with open_guest_process(vcpus=2, vcpu_ids=[0, 5], stats_fds=True, port_writes=PORT_WRITES) as guest:
        (vm,) = find_held(discovery, guest.pid)
        counters = stats_fd.read([vm])[vm.key]
        if not stats_fd.tells_rips:
            with pytest.raises(SourceUnavailable, match="no registers"):
                stats_fd.read_vcpu(vm.key, 5)
        stats_fd.tells_rips = True
        open_before = set(os.listdir("/proc/self/fd"))
        state = stats_fd.read_vcpu(vm.key, 5)
        assert len(set(os.listdir("/proc/self/fd")) - open_before) <= 1  # the listing's own
        assert state is not None
        assert (state.vcpu_id, state.tid, state.registers, state.vm_type) == (5, None, {}, None)
        assert state.statistics[EXITS] == (counters.per_vcpu[EXITS][1],)
        assert len(state.statistics) > 40
        assert len(state.statistics["halt_poll_success_hist"]) == 32
        assert stats_fd.read_vcpu(vm.key, 1) is None
        assert stats_fd.read_vcpu(vm.key._replace(start_ticks=1), 5) is None
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait()
        assert stats_fd.read_vcpu(vm.key, 5) is None
    stats_fd.read([])
    assert stats_fd.read_vcpu(vm.key, 5) is None


def test_a_vm_that_is_read_again_costs_no_other_what_is_known_of_it(
    discovery: Discovery, stats_fd: StatsFdSource
) -> None:
    """A VM that moves its fds all the time is read again in each snapshot: others' vCPUs can be read all the same."""
    with open_guest_process(stats_fds=True, port_writes=1) as steady, open_guest_process(stats_fds=True) as moving:
        (vm,), (moved,) = (find_held(discovery, guest.pid) for guest in (steady, moving))
        assert stats_fd.read([vm, replace(moved, stats_fds={0: 1023})]).keys() == {vm.key}
        exits = stats_fd.read([moved], again=True)[moved.key].per_vcpu[EXITS]
        stats_fd.tells_rips = True  # as on a KVM with the patches
        for key in (vm.key, moved.key):
            assert stats_fd.read_vcpu(key, 0) is not None
        assert stats_fd.read([moved])[moved.key].per_vcpu[EXITS] == exits
        assert stats_fd.read_vcpu(vm.key, 0) is None


def test_reading_leaves_no_fd_behind(discovery: Discovery, stats_fd: StatsFdSource) -> None:
    with open_guest_process(vcpus=4, stats_fds=True, port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        stats_fd.read([vm])
        open_before = set(os.listdir("/proc/self/fd"))
        for _ in range(100):
            stats_fd.read([vm])
        assert len(set(os.listdir("/proc/self/fd")) - open_before) <= 1  # the listing's own


def test_a_full_fd_table_costs_the_values_and_no_more(discovery: Discovery) -> None:
    troubles: list[str] = []
    source = StatsFdSource(WANTED, lambda _pid, _kind, message: troubles.append(message))
    source.open()
    with open_guest_process(stats_fds=True, port_writes=1) as guest:
        (vm,) = find_held(discovery, guest.pid)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            counters = source.read([vm])[vm.key]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert counters.per_vcpu == {}
        assert "Too many open files" in troubles[0]
        assert source.read([vm])[vm.key].per_vcpu[EXITS]


def test_debugfs_reads_or_says_that_lockdown_closes_it(discovery: Discovery) -> None:
    source = DebugfsSource(WANTED, KVM_DEBUGFS, PROC, refuse_trouble)
    lockdown = Path("/sys/kernel/security/lockdown").read_text()
    if "[none]" not in lockdown:
        with pytest.raises(SourceUnavailable, match="lockdown forbids"):
            source.open()
        return
    source.open()
    with open_guest_process(vcpus=2, port_writes=PORT_WRITES) as guest:
        (vm,) = find_held(discovery, guest.pid)
        counters = source.read([vm])[vm.key]
        assert counters.totals[EXITS] >= 2 * PORT_WRITES
        assert counters.vcpu_ids == (0, 1)
