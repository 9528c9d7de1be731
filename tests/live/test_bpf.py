"""The eBPF source on this host's kernel, with VMs of other processes."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvm import syscalls
from kvm.binary_stats import decode_header
from kvm.bpf.bpf_object import BpfObject
from kvm.bpf.libbpf import open_library
from kvm.bpf.unowned_vms import REST_FACTOR
from kvm.bpf.vcpu_decode import HostBlocks
from kvm.bpf.vcpu_programs import DIRECT_OBJECT, KEPT_VMS, OBJECT, VcpuPrograms
from kvm.counters.bpf import BpfSource
from kvm.errors import SourceUnavailable
from kvm.host.throwaway_vm import ThrowawayVm
from kvm.model import RIP_STATISTICS, VmCounters, VmKey
from tests.agents import ROOT
from tests.live import OTHER_EXITS, GuestProcess, open_guest_process, strange_vmm
from tests.verifier_bill import MOST, read_bill, takes_direct_loads
from tests.waiting import wait_until

pytestmark = pytest.mark.live

NAMES = ("exits", "notify_window_exits", "halt_exits")
NO_DEVICE = Path("/nonexistent/kvm")
MAKERS: dict[str, Callable[[], BpfSource]] = {
    "list": lambda: BpfSource(NAMES),
    "list, by helper": lambda: BpfSource(NAMES, fast_objects=()),
    "files": lambda: BpfSource(NAMES, with_list=False),
    "names": lambda: BpfSource(("exits", "notify_window_exits"), device=NO_DEVICE),
}


TRY = """
from kvm.errors import SourceUnavailable
from kvm.counters.bpf import BpfSource
source = BpfSource()
try:
    source.open()
    print(source.method, source.method_reason)
except SourceUnavailable as err:
    print(err)
"""


@contextmanager
def open_source(method: str = "list") -> Iterator[BpfSource]:
    source = MAKERS[method]()
    source.open()
    try:
        assert source.method == method.partition(",")[0]
        yield source
    finally:
        source.close()


@pytest.fixture(scope="module", params=MAKERS)
def source(request: pytest.FixtureRequest) -> Iterator[BpfSource]:
    """The source, once for each way to find VMs."""
    with open_source(request.param) as source:
        yield source


@pytest.fixture(scope="module")
def list_source() -> Iterator[BpfSource]:
    with open_source() as source:
        yield source


class Strange(dict[str, Any]):
    """What a strange VMM has told of itself."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__()
        self._process = process
        self.listen()

    def listen(self) -> None:
        assert self._process.stdout is not None
        self.update(json.loads(self._process.stdout.readline()))

    def change(self) -> None:
        """Let it change as its way is, and tell again."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.listen()


@contextmanager
def open_strange(way: str) -> Iterator[Strange]:
    words = [sys.executable, strange_vmm.__file__, way]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Strange(process)
        process.communicate()


def read_of(source: BpfSource, *pids: int) -> dict[VmKey, VmCounters]:
    return {key: counters for key, counters in source.read().items() if key.pid in pids}


def make_key(pid: int, vm_fd: int) -> VmKey:
    """Field 22 of /proc/PID/stat says when the process started; Python's name has no parenthesis in it."""
    return VmKey(pid, int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]), vm_fd)


def test_a_vm_has_its_key_its_vcpus_and_their_threads(source: BpfSource) -> None:
    with open_guest_process(vcpus=3, style="firecracker", port_writes=23) as guest:
        ((key, counters),) = read_of(source, guest.pid).items()
        assert key == make_key(guest.pid, guest.vm_fd)
        assert counters.vcpu_ids == (0, 1, 2)
        assert counters.tids == tuple(vcpu.tid for vcpu in guest.vcpus)
        before = counters.per_vcpu["exits"]
        guest.run(1000)
        after = read_of(source, guest.pid)[key]
        assert all(1000 <= b - a <= 1000 + OTHER_EXITS for a, b in zip(before, after.per_vcpu["exits"], strict=True))
        assert after.per_vcpu["notify_window_exits"] == (0, 0, 0)
        assert (after.notify_window_cycles, after.notify_flags) == (0, 0)
        assert after.vcpu_ids is counters.vcpu_ids
        assert after.tids is counters.tids
    assert read_of(source, guest.pid) == {}


def test_a_vm_without_vcpus(source: BpfSource) -> None:
    with open_strange("empty") as vmm:
        ((key, counters),) = read_of(source, vmm["pid"]).items()
        assert key == make_key(vmm["pid"], vmm["vm_fd"])
        assert (counters.vcpu_ids, counters.tids) == ((), ())
        assert set(counters.per_vcpu.values()) == {()}


def test_vcpu_ids_ascend_and_have_no_thread_before_they_run(source: BpfSource) -> None:
    with open_strange("ids_that_fall") as vmm:
        (counters,) = read_of(source, vmm["pid"]).values()
        assert (counters.vcpu_ids, counters.tids) == ((2, 5, 7), (None, None, None))


def test_values_stand_with_their_vcpus_though_ids_fall(source: BpfSource) -> None:
    with open_guest_process(vcpus=3, vcpu_ids=[9, 4, 6], port_writes=1) as guest:
        (before,) = read_of(source, guest.pid).values()
        guest.send("notify vcpu=0 exits=1 other=500")
        guest.wait_for("done")
        (counters,) = read_of(source, guest.pid).values()
        assert counters.vcpu_ids == (4, 6, 9)
        assert counters.tids == tuple(guest.vcpus[index].tid for index in (1, 2, 0))
        ran = [b - a for a, b in zip(before.per_vcpu["exits"], counters.per_vcpu["exits"], strict=True)]
        assert ran[:2] == [0, 0]
        assert ran[2] >= 500


def test_several_vms_of_one_process_are_told_apart(source: BpfSource) -> None:
    with open_strange("several") as vmm:
        found = read_of(source, vmm["pid"])
        assert [key.vm_fd for key in sorted(found)] == vmm["vm_fds"]
        assert [found[key].vcpu_ids for key in sorted(found)] == [(0, 1), (0, 1, 2)]


def test_vms_without_a_vm_file_keep_keys_of_their_own(source: BpfSource) -> None:
    with open_strange("vcpus_only") as vmm:
        keys = set(read_of(source, vmm["pid"]))
        assert {key.vm_fd for key in keys} == {-1, -2}
        assert set(read_of(source, vmm["pid"])) == keys


def test_fds_are_searched_for_a_file_that_its_process_has_closed_only_now_and_then(list_source: BpfSource) -> None:
    assert list_source._programs is not None
    control = list_source._programs.control
    with open_strange("vcpus_only") as vmm:
        searched = []
        for _ in range(130):
            assert len(read_of(list_source, vmm["pid"])) == 2
            searched.append(control.read("slots"))
    assert searched[0] > 0
    assert 2 <= sum(slots > 0 for slots in searched[1:]) <= 6  # two VMs, each 64 looks, some of which are repeated


def test_duplicated_files_count_once_and_the_lowest_fd_names_the_vm(source: BpfSource) -> None:
    with open_strange("duplicates") as vmm:
        ((key, counters),) = read_of(source, vmm["pid"]).items()
        assert key.vm_fd == vmm["vm_fd"]
        assert counters.vcpu_ids == (0, 1)


def test_files_that_a_child_holds_too_are_listed_under_the_owner_and_after_its_end_under_the_child(
    source: BpfSource,
) -> None:
    with open_strange("with_child") as vmm:
        child = vmm["child"]
        try:
            ((key, counters),) = read_of(source, vmm["pid"], child).items()
            assert (key.pid, counters.vcpu_ids) == (vmm["pid"], (0, 1))
            os.kill(vmm["pid"], signal.SIGKILL)
            wait_until(lambda: [key.pid for key in read_of(source, vmm["pid"], child)] == [child], seconds=10)
            ((key, counters),) = read_of(source, child).items()
            assert (key, counters.vcpu_ids) == (make_key(child, vmm["vm_fd"]), (0, 1))
        finally:
            os.kill(child, signal.SIGKILL)
        wait_until(lambda: not read_of(source, child), seconds=10)


def test_the_files_of_the_host_are_searched_seldom_for_a_vm_that_a_child_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, on which a search takes as long as one of 1.2 million files."""
    now, searches = 0.0, 0
    read_files = VcpuPrograms.read_files

    def count_searches(programs: VcpuPrograms) -> HostBlocks:
        nonlocal now, searches
        searches, now = searches + 1, now + 0.09
        return read_files(programs)

    monkeypatch.setattr(VcpuPrograms, "read_files", count_searches)
    source = BpfSource(NAMES, clock=lambda: now)
    source.open()
    with open_strange("with_child") as vmm:
        child = vmm["child"]
        try:
            first = read_of(source, vmm["pid"])
            os.kill(vmm["pid"], signal.SIGKILL)
            psutil.Process(vmm["pid"]).wait()
            searches, found = 0, []
            for _ in range(200):
                now += 1.0
                found.append(read_of(source, child))
        finally:
            os.kill(child, signal.SIGKILL)
            source.close()
    (key,) = found[-1]
    assert (key.pid, key.vm_fd) == (child, vmm["vm_fd"])
    assert all(found[2:])
    assert found[-1][key].per_vcpu == next(iter(first.values())).per_vcpu
    assert 2 <= searches <= 1 + now / (REST_FACTOR * 0.09)


def test_a_vm_whose_leader_thread_has_exited(source: BpfSource) -> None:
    with open_strange("without_leader") as vmm:
        assert os.listdir(f"/proc/{vmm['pid']}/task") != [str(vmm["pid"])]
        ((key, counters),) = read_of(source, vmm["pid"]).items()
        assert key == make_key(vmm["pid"], vmm["vm_fd"])
        assert counters.vcpu_ids == (0, 1)


def test_a_vm_whose_leader_thread_exits_between_two_looks(source: BpfSource) -> None:
    with open_strange("until_the_leader_ends") as vmm:
        before = read_of(source, vmm["pid"])
        vmm.change()
        assert read_of(source, vmm["pid"]) == before
        assert list(before) == [make_key(vmm["pid"], vmm["vm_fd"])]


def test_a_vm_whose_file_moves_to_another_fd(source: BpfSource) -> None:
    with open_strange("until_its_file_moves") as vmm:
        assert list(read_of(source, vmm["pid"])) == [make_key(vmm["pid"], vmm["vm_fd"])]
        first = vmm["vm_fd"]
        vmm.change()
        assert vmm["vm_fd"] != first
        assert list(read_of(source, vmm["pid"])) == [make_key(vmm["pid"], first)]  # it is the same VM


def test_single_vcpus_are_never_those_of_a_vm_that_took_the_place() -> None:
    """The memory of a VM that ended is soon another's; the key of the dead one must not lead to it."""
    answers = 0
    source = BpfSource()
    source.open()
    for _ in range(30):
        with open_guest_process(port_writes=3) as gone:
            ((key, counters),) = read_of(source, gone.pid).items()
            assert source.read_vcpu(key, counters.vcpu_ids[0]) is not None
        with open_guest_process(port_writes=3):
            answers += source.read_vcpu(key, 0) is not None
    source.close()
    assert answers == 0


def test_a_process_with_as_many_files_as_it_may_have(source: BpfSource) -> None:
    with open_strange("many_files") as vmm:
        assert vmm["files"] >= 1024
        ((key, counters),) = read_of(source, vmm["pid"]).items()
        assert (key.vm_fd, counters.vcpu_ids) == (vmm["vm_fd"], (0, 1))


def test_files_that_are_only_called_like_kvms_are_nothing(source: BpfSource) -> None:
    with open_strange("forgeries") as vmm:
        names = [os.readlink(f"/proc/{vmm['pid']}/fd/{fd}") for fd in os.listdir(f"/proc/{vmm['pid']}/fd")]
        assert sum(name.endswith("/kvm-vcpu:0") for name in names) == 1
        assert read_of(source, vmm["pid"]) == {}


def test_all_ways_give_the_same_answers() -> None:
    with ExitStack() as stack:
        guests = [
            stack.enter_context(open_guest_process(vcpus=vcpus, style=style, port_writes=5))
            for vcpus, style in ((1, "qemu"), (4, "firecracker"), (70, "qemu"))
        ]
        pids = [guest.pid for guest in guests]
        answers = {method: read_of(stack.enter_context(open_source(method)), *pids) for method in MAKERS}
        assert len(answers["list"]) == len(guests)
        assert answers["list"] == answers["files"]
        without_descriptors = {
            key: {name: counters.per_vcpu[name] for name in ("exits", "notify_window_exits")}
            for key, counters in answers["list"].items()
        }
        assert {key: counters.per_vcpu for key, counters in answers["names"].items()} == without_descriptors


def read_exits(guests: list[GuestProcess]) -> dict[int, int]:
    """Exits by vCPU thread, through the stats fds that the guests hold."""
    with ThrowawayVm() as vm:
        offset = vm.statistics["exits"].offset
    exits = {}
    for guest in guests:
        pidfd = os.pidfd_open(guest.pid)
        for vcpu in guest.vcpus:
            fd = syscalls.pidfd_getfd(pidfd, vcpu.stats_fd)
            header = decode_header(os.pread(fd, 24, 0), "a guest's stats fd")
            exits[vcpu.tid] = int.from_bytes(os.pread(fd, 8, header.data_offset + offset), sys.byteorder)
            os.close(fd)
        os.close(pidfd)
    return exits


def test_exits_of_a_thousand_running_vcpus_lie_between_two_readings_of_statistics_fds(list_source: BpfSource) -> None:
    with ExitStack() as stack:
        guests = [stack.enter_context(open_guest_process(vcpus=250, stats_fds=True, port_writes=2)) for _ in range(4)]
        for guest in guests:
            guest.send("loop")
        start = read_exits(guests)
        wait_until(lambda: sum(map(int.__lt__, start.values(), read_exits(guests).values())) >= 100, seconds=10)
        before = read_exits(guests)
        found = read_of(list_source, *(guest.pid for guest in guests))
        after = read_exits(guests)
        for guest in guests:
            guest.send("quit")
    read = {
        tid: exits
        for counters in found.values()
        for tid, exits in zip(counters.tids, counters.per_vcpu["exits"], strict=True)
    }
    assert read.keys() == before.keys()
    assert len(read) == 1000
    assert all(0 < before[tid] <= exits <= after[tid] for tid, exits in read.items() if tid is not None)
    assert sum(after.values()) > sum(before.values())


def test_one_vcpu_in_full(list_source: BpfSource) -> None:
    with open_guest_process(vcpus=2, vcpu_ids=[3, 8]) as guest:
        done = {d["vcpu"]: d["registers"] for d in guest.run(9)}
        (key,) = read_of(list_source, guest.pid)
        state = list_source.read_vcpu(key, 8)
        assert state is not None
        assert (state.vcpu_id, state.tid, state.guest_mode) == (8, guest.vcpus[1].tid, False)
        fresh = {name: value for name, value in state.registers.items() if name not in state.stale}
        assert fresh == {name: done[1][name] for name in fresh}
        assert {"rax", "rbx", "rcx"} <= fresh.keys()
        assert state.statistics["exits"] == (read_of(list_source, guest.pid)[key].per_vcpu["exits"][1],)
        assert len(state.statistics["halt_poll_success_hist"]) > 1
        assert list_source.tells_rips is (state.statistics.keys() >= set(RIP_STATISTICS))
        assert list_source.read_vcpu(key, 5) is None
    assert list_source.read_vcpu(key, 8) is None


def test_room_is_made_for_more_vcpus_than_expected() -> None:
    source = BpfSource(NAMES, capacity=4)
    source.open()
    with open_guest_process(vcpus=70, port_writes=1) as guest:
        (counters,) = read_of(source, guest.pid).values()
        assert counters.vcpu_ids == tuple(range(70))
        assert min(counters.per_vcpu["exits"]) > 0
    source.close()


def test_two_agents_at_once() -> None:
    with open_source() as one, open_source() as other, open_guest_process(vcpus=2, port_writes=1) as guest:
        answers: list[Mapping[VmKey, VmCounters]] = []
        threads = [
            threading.Thread(target=lambda source=source: answers.extend(read_of(source, guest.pid) for _ in range(50)))
            for source in (one, other, one)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 150
        assert all(answer == answers[0] for answer in answers)


def test_vms_that_die_while_they_are_read_are_there_or_not_but_never_wrong(list_source: BpfSource) -> None:
    """Each VM has vCPUs 0 to 7, each of which has run; a reading of anything else would be of freed memory."""
    members = [member for member in (fork_vm() for _ in range(150)) if member]
    pids = set(members)

    def kill() -> None:
        for pid in members:
            os.kill(pid, signal.SIGKILL)

    deaths = threading.Thread(target=kill)
    seen = read_of(list_source, *pids)
    assert len(seen) == len(pids)
    deaths.start()
    while seen:
        assert {counters.vcpu_ids for counters in seen.values()} == {tuple(range(8))}
        assert {key.vm_fd for key in seen} == {key.vm_fd for key in seen if key.vm_fd > 0}
        assert {counters.per_vcpu["notify_window_exits"] for counters in seen.values()} == {(0,) * 8}
        assert {counters.per_vcpu["exits"] for counters in seen.values()} == {(0,) * 8}
        seen = read_of(list_source, *pids)
    deaths.join()
    for pid in pids:
        os.waitpid(pid, 0)


def fork_vm() -> int:
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        strange_vmm.make_vm(*range(8))
        os.write(telling, b".")
        signal.pause()
    os.close(telling)
    assert os.read(told, 1) == b"."
    os.close(told)
    return pid


def test_nothing_is_left_open_and_no_vm_is_kept_alive() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    source = BpfSource()
    source.open()
    opened = psutil.Process().num_fds()
    with open_guest_process(port_writes=1) as guest:
        directory = Path(f"/sys/kernel/debug/kvm/{guest.creator_tid}-{guest.vm_fd}")
        assert directory.exists()
        for _ in range(20):
            assert read_of(source, guest.pid)
    wait_until(lambda: not directory.exists(), "the VM is gone", seconds=1)
    assert psutil.Process().num_fds() <= opened + 2  # the iterator's link, from the first read on
    source.close()
    source.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


REFUSALS = {
    "cap_bpf": ("setpriv --bounding-set=-sys_admin,-bpf", "missing capability: CAP_BPF;"),
    "cap_perfmon": ("setpriv --bounding-set=-sys_admin,-perfmon", "missing capability: CAP_PERFMON;"),
    "no_capabilities": ("setpriv --reuid=65534 --clear-groups", "missing capability: CAP_BPF, CAP_PERFMON;"),
    "user_namespace": ("unshare --user --map-root-user", "capabilities of a user namespace do not reach BPF;"),
    "pid_namespace": ("unshare --pid --fork --mount-proc", "this runs in a pid namespace of its own (pid 1 here, "),
    "no_btf": (
        "unshare --mount sh -c 'mount -t tmpfs none /sys/kernel/btf && exec \"$@\"' -",
        "the kernel describes no",
    ),
}


@pytest.mark.parametrize("way", REFUSALS)
def test_a_refusal_says_what_is_missing(way: str) -> None:
    """Another process, which may do less; what it says goes through the real kernel and the real libbpf."""
    prefix, message = REFUSALS[way]
    words = [*shlex.split(prefix), sys.executable, "-c", TRY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith(message)
    assert "; " in done.stdout


TRY_WITH_FEW_FDS = """
import os, resource
from kvm.bpf.libbpf import open_library
from kvm.counters.bpf import BpfSource
from kvm.errors import SourceUnavailable
open_library()
held = [os.eventfd(0) for _ in range(100)]
resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, 4096))
while len(held) > 55:
    source = BpfSource()
    try:
        source.open()
        print(source.method, source.method_reason)
    except SourceUnavailable as err:
        print(err)
    source.close()
    os.close(held.pop())
"""


def test_too_few_fds_are_called_that_and_nothing_is_remembered_of_them() -> None:
    """libbpf finds out what the kernel can do once in a process: it must not do so without fds."""
    command = [sys.executable, "-c", TRY_WITH_FEW_FDS]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    refused = [line for line in lines if "list" not in line]
    assert (len(lines), set(lines[len(refused) :])) == (45, {"list "})
    assert len(refused) >= 20
    for line in refused:
        assert "too few fds are left" in line, lines
        assert "LimitNOFILE" in line, lines


def test_without_libbpf_the_remedy_is_a_package() -> None:
    source = BpfSource(library="libbpf.so.99")
    with pytest.raises(SourceUnavailable, match=r"libbpf.so.99 cannot be loaded") as refused:
        source.open()
    assert "apt install libbpf1" in refused.value.remedy


def test_another_library_under_its_name_is_refused() -> None:
    with pytest.raises(SourceUnavailable, match=r"libc.so.6 cannot be loaded .*libbpf_set_print"):
        BpfSource(library="libc.so.6").open()


def test_our_own_vm_is_gone_when_the_source_is_open(source: BpfSource) -> None:
    assert read_of(source, os.getpid()) == {}


def fill_map(fd: int, entries: int) -> int:
    """Fill a map with 8-byte keys from all CPUs in turns, a hundred at a time; returns how many are there then."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    value = ctypes.create_string_buffer(64)
    cpus = sorted(os.sched_getaffinity(0))
    batches = [range(start, min(start + 100, entries + 1)) for start in range(1, entries + 1, 100)]
    try:
        for number, batch in enumerate(batches):
            os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            for key in batch:
                assert (
                    libbpf.bpf_map_update_elem(fd, ctypes.byref(ctypes.c_uint64(key)), value, ctypes.c_uint64(0)) == 0
                )
    finally:
        os.sched_setaffinity(0, cpus)
    keys = (ctypes.byref(ctypes.c_uint64(key)) for key in range(1, entries + 1))
    return sum(libbpf.bpf_map_lookup_elem(fd, key, value) == 0 for key in keys)


@pytest.mark.parametrize("name", ["owners", "unowned_vms"])
def test_maps_keep_as_much_as_they_are_meant_to_however_many_cpus_set_entries_aside(name: str) -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one CPU alone takes nothing from others")
    library = open_library()
    tight = BpfObject(library, OBJECT)
    tight.set_entries(name, KEPT_VMS)
    tight.load()
    try:
        assert fill_map(tight.map_fd(name), KEPT_VMS) < KEPT_VMS
    finally:
        tight.close()
    programs = VcpuPrograms(library, 16, 1)
    try:
        assert fill_map(programs.map_fd(name), KEPT_VMS) == KEPT_VMS
    finally:
        programs.close()


def test_direct_loads_are_used_where_the_kernel_takes_them() -> None:
    library = open_library()
    programs = BpfObject(library, DIRECT_OBJECT)
    try:
        expected = DIRECT_OBJECT if takes_direct_loads(programs) else OBJECT
    finally:
        programs.close()
    with open_source() as source:
        assert source.programs == expected.name


def test_the_verifier_has_little_to_do(tell: Callable[[str], None]) -> None:
    bill = dict(read_bill())
    tell(f"verified instructions on {os.uname().release}: {bill}")
    assert max(bill.values()) <= MOST
