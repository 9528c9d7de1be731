"""Discovery's parsers, and its bookkeeping on simulated /proc trees; tests/live has it on real processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.discovery.kvm_fds import (
    MAX_VM_FDS,
    VmHolders,
    compare_numbers,
    find_distinct,
    holds_several_vms,
    parse_kvm_links,
)
from kvm.discovery.processes import parse_stat
from kvm.discovery.uevents import parse_uevent
from kvm.discovery.vm_discovery import OTHER_SECONDS, VMM_SECONDS, YOUNG_SECONDS, Discovery
from kvm.errors import MalformedData
from kvm.model import VmKey

CREATE = (
    b"change@/devices/virtual/misc/kvm\0ACTION=change\0DEVPATH=/devices/virtual/misc/kvm\0SUBSYSTEM=misc\0"
    b"CREATED=3\0COUNT=1\0EVENT=create\0PID=30373\0STATS_PATH=/kvm/30373-4\0"
)


class FakeProc:
    """A /proc with one process: the number is that of a real one, so that it can be held by a pidfd."""

    def __init__(self, root: Path, pid: int) -> None:
        self.root, self.pid = root, pid
        self.fds = root / str(pid) / "task" / str(pid) / "fd"
        self.fds.mkdir(parents=True)
        (root / str(pid) / "stat").write_text(f"{pid} (a) R 1 (b)) S " + "0 " * 18 + "4242 0\n")

    def put(self, fd: int, link: str) -> None:
        (self.fds / str(fd)).unlink(missing_ok=True)
        (self.fds / str(fd)).symlink_to(link)


class Scene:
    """Discovery over a FakeProc, with a clock that the test moves, and the troubles it told of."""

    def __init__(self, proc: FakeProc, process: subprocess.Popen[bytes]) -> None:
        self.proc = proc
        self.process = process
        self.now = 1000.0
        self.uevents: list[bytes] = []
        self.troubles: list[tuple[int, str]] = []
        self.discovery = Discovery(
            proc.root,
            lambda pid, kind, _message: self.troubles.append((pid, kind)),
            clock=lambda: self.now,
            uevents=lambda: self.uevents.pop() if self.uevents else b"",
            compare=compare_numbers,
        )

    def vcpu_ids(self, after_seconds: float = 0.0) -> list[tuple[int, ...] | None]:
        self.now += after_seconds
        return [vm.vcpu_ids for vm in self.discovery.find_vms()]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    process = subprocess.Popen(["sleep", "600"])
    scene = Scene(FakeProc(tmp_path, process.pid), process)
    yield scene
    scene.discovery.close()
    process.kill()
    process.wait()


def test_links_are_sorted_out() -> None:
    links = [
        (12, "anon_inode:kvm-vcpu-stats:4"),
        (5, "anon_inode:kvm-vcpu:0"),
        (4, "anon_inode:kvm-vm"),
        (9, "anon_inode:kvm-vcpu-stats:4"),  # QEMU after a replug holds two
        (6, "anon_inode:kvm-vcpu:4"),
        (7, "/tmp/anon_inode:kvm-vcpu:9"),
        (8, "/tmp/kvm-vcpu:9"),
        (10, "anon_inode:kvm-vm-stats"),
        (11, "anon_inode:kvm-vcpu:x"),
    ]
    files = parse_kvm_links(links)
    assert (files.vms, files.vcpus, files.stats) == ([4], {0: [5], 4: [6]}, {4: 9})


def test_a_thread_name_cannot_move_the_fields_of_stat() -> None:
    text = "77 (evil) R 1 2 3) S " + " ".join(str(number) for number in range(4, 22)) + " 123456 9 9\n"
    assert parse_stat(text, "here") == ("S", 123456)


@given(st.text())
def test_any_text_is_a_stat_or_malformed(text: str) -> None:
    try:
        parse_stat(text, "here")
    except MalformedData as err:
        assert err.origin == "here"


def test_a_vms_creation_names_its_thread() -> None:
    assert parse_uevent(CREATE) == 30373
    assert parse_uevent(CREATE.replace(b"EVENT=create", b"EVENT=destroy")) is None
    assert parse_uevent(CREATE.replace(b"misc/kvm\0ACTION", b"misc/kvm2\0ACTION")) is None


@given(st.binary())
def test_any_message_is_a_thread_or_none(message: bytes) -> None:
    for text in (message, CREATE + message, CREATE.replace(b"30373", message)):
        tid = parse_uevent(text)
        assert tid is None or 0 <= tid < 10**12


def test_a_vm_appears_grows_and_goes(scene: Scene) -> None:
    assert scene.vcpu_ids() == []
    scene.proc.put(4, "anon_inode:kvm-vm")
    assert scene.vcpu_ids(1) == [()]  # its process is young: looked at again at once
    scene.proc.put(5, "anon_inode:kvm-vcpu:0")
    assert scene.vcpu_ids(1) == [(0,)]
    assert scene.vcpu_ids(YOUNG_SECONDS - 3) == [(0,)]
    scene.proc.put(6, "anon_inode:kvm-vcpu:1")
    assert scene.vcpu_ids(2) == [(0,)]  # young no more: hot-plug is found within VMM_SECONDS
    assert scene.vcpu_ids(VMM_SECONDS) == [(0, 1)]
    for name in os.listdir(scene.proc.fds):
        (scene.proc.fds / name).unlink()
    assert scene.vcpu_ids(VMM_SECONDS) == []


def test_a_process_that_becomes_a_vmm_late_is_found_by_its_uevent_or_by_time(scene: Scene) -> None:
    scene.vcpu_ids()
    assert scene.vcpu_ids(YOUNG_SECONDS) == []
    scene.proc.put(4, "anon_inode:kvm-vm")
    assert scene.vcpu_ids(VMM_SECONDS) == []
    status = scene.proc.root / str(scene.proc.pid) / "status"
    status.write_text(f"Name:\tx\nTgid:\t{scene.proc.pid}\n")
    scene.uevents.append(CREATE.replace(b"30373", str(scene.proc.pid).encode()))
    assert scene.vcpu_ids(1) == [()]
    scene.proc.put(5, "anon_inode:kvm-vcpu:3")
    assert scene.vcpu_ids(1) == [(3,)]
    scene.proc.put(6, "anon_inode:kvm-vcpu:7")
    assert scene.vcpu_ids(OTHER_SECONDS) == [(3, 7)]


def test_links_are_not_read_again_while_the_listing_is_the_same(scene: Scene) -> None:
    scene.proc.put(4, "anon_inode:kvm-vm")
    scene.proc.put(5, "anon_inode:kvm-vcpu:0")
    assert scene.vcpu_ids() == [(0,)]
    scene.proc.put(5, "anon_inode:kvm-vcpu:9")  # a listing cannot show this; no VMM does it
    assert scene.vcpu_ids(OTHER_SECONDS) == [(0,)]
    scene.proc.put(6, "socket:[1]")
    assert scene.vcpu_ids(OTHER_SECONDS) == [(9,)]


def test_a_vm_is_known_by_pid_start_and_fd_and_held_by_a_pidfd(scene: Scene) -> None:
    scene.proc.put(7, "anon_inode:kvm-vm")
    scene.proc.put(8, "anon_inode:kvm-vcpu-stats:0")
    (vm,) = scene.discovery.find_vms()
    assert vm.key == (scene.proc.pid, 4242, 7)
    assert vm.stats_fds == {0: 8}
    assert os.readlink(f"/proc/self/fd/{vm.pidfd}") == "anon_inode:[pidfd]"
    scene.discovery.close()
    assert not Path(f"/proc/self/fd/{vm.pidfd}").exists()


def test_a_process_that_makes_no_sense_costs_only_itself(scene: Scene) -> None:
    scene.proc.put(4, "anon_inode:kvm-vm")
    (scene.proc.root / str(scene.proc.pid) / "stat").write_text("nonsense")
    (scene.proc.root / "999999999").mkdir()  # listed, and gone when it is looked at
    assert scene.vcpu_ids() == []
    assert scene.troubles == [(scene.proc.pid, "unreadable")]


def test_one_vm_at_several_fds_is_one_and_keeps_the_fd_it_is_known_by() -> None:
    files = {4: "a", 7: "a", 9: "b"}

    def compare(_tid: int, _other_tid: int, fd: int, other_fd: int) -> int:
        mine, other = files[fd], files[other_fd]
        return 0 if mine == other else 1 if mine < other else 2

    assert find_distinct(1, [4, 7, 9], [], compare) == [4, 9]
    assert find_distinct(1, [4, 7, 9], [7], compare) == [7, 9]
    assert find_distinct(1, [4, 9], [7], compare) == [4, 9]


def test_two_vcpus_of_one_id_are_two_vms_unless_they_are_one_file() -> None:
    files = parse_kvm_links([(4, "anon_inode:kvm-vm"), (5, "anon_inode:kvm-vcpu:0"), (6, "anon_inode:kvm-vcpu:0")])
    assert holds_several_vms(1, files, compare_numbers)
    assert not holds_several_vms(1, files, lambda *_fds: 0)
    crowd = parse_kvm_links([(fd, "anon_inode:kvm-vcpu:0") for fd in range(MAX_VM_FDS + 1)])
    assert holds_several_vms(1, crowd, lambda *_fds: 0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 4)), max_size=40, unique_by=lambda h: h[:2])
)
def test_of_those_who_hold_a_vm_the_first_started_owns_it(holders: list[tuple[int, int, int]]) -> None:
    """Holders are (pid, fd, file); a pid's start time is the pid."""
    files = {(pid, fd): file for pid, fd, file in holders}

    def compare(tid: int, other_tid: int, fd: int, other_fd: int) -> int:
        mine, other = files[tid, fd], files[other_tid, other_fd]
        return 0 if mine == other else 1 if mine < other else 2

    owners = VmHolders(compare)
    said = {file: owners.claim(pid, fd, VmKey(pid, pid, fd))[0].pid for pid, fd, file in holders}
    assert said == {file: min(pid for pid, _fd, other in holders if other == file) for file in said}


def test_a_holder_that_is_gone_does_not_stand_in_the_way() -> None:
    files = {(1, 4): "a", (2, 4): "b"}

    def compare(tid: int, other_tid: int, fd: int, other_fd: int) -> int:
        try:
            mine, other = files[tid, fd], files[other_tid, other_fd]
        except KeyError as err:
            raise ProcessLookupError(err) from err
        return 0 if mine == other else 1 if mine < other else 2

    owners = VmHolders(compare)
    for pid in (1, 2):
        owners.claim(pid, 4, VmKey(pid, pid, 4))
    files[3, 4] = files.pop((1, 4))
    assert owners.claim(3, 4, VmKey(3, 3, 4)) == (VmKey(3, 3, 4), None)


def test_a_failure_on_the_way_is_tried_again(scene: Scene) -> None:
    scene.proc.put(4, "anon_inode:kvm-vm")
    good = (scene.proc.root / str(scene.proc.pid) / "stat").read_text()
    (scene.proc.root / str(scene.proc.pid) / "stat").write_text("nonsense")
    assert scene.vcpu_ids() == []
    (scene.proc.root / str(scene.proc.pid) / "stat").write_text(good)
    assert scene.vcpu_ids(1) == [()]


def test_a_process_that_ended_is_gone_at_once_although_its_directory_stays(scene: Scene) -> None:
    scene.proc.put(4, "anon_inode:kvm-vm")
    assert scene.vcpu_ids() == [()]
    scene.process.kill()
    os.waitid(os.P_PID, scene.proc.pid, os.WEXITED | os.WNOWAIT)  # a zombie: still in /proc
    (scene.proc.root / str(scene.proc.pid) / "stat").write_text(f"{scene.proc.pid} (a) Z " + "0 " * 19 + "\n")
    (scene.proc.root / str(scene.proc.pid) / "task" / str(scene.proc.pid) / "stat").write_text("1 (a) Z " + "0 " * 19)
    assert scene.vcpu_ids(1) == []


def test_a_slow_process_is_left_alone_for_a_hundred_times_as_long(scene: Scene) -> None:
    scene.proc.put(4, "anon_inode:kvm-vm")
    slow = scene.discovery

    class Slowly:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            self.calls += 1
            scene.now += 0.5
            return scene.now

    clock = Slowly()
    slow._clock = clock
    slow.find_vms()
    scanned_at = slow._processes[scene.proc.pid].scanned_at
    slow._clock = lambda: scene.now
    scene.proc.put(5, "anon_inode:kvm-vcpu:0")
    assert scene.vcpu_ids(10) == [()]
    assert slow._processes[scene.proc.pid].scanned_at == scanned_at
    assert scene.vcpu_ids(60) == [(0,)]


class CrowdedProc:
    """A /proc with processes that make no sense, so that each scan is told of, and a clock that scans take time of."""

    SCAN_SECONDS = 0.001

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0
        self.uevents: list[bytes] = []
        self.scanned: list[int] = []
        self.discovery = Discovery(
            root,
            lambda pid, _kind, _message: self.scanned.append(pid),
            clock=self.tick,
            uevents=lambda: self.uevents.pop() if self.uevents else b"",
            compare=compare_numbers,
        )
        self.discovery.find_vms()

    def tick(self) -> float:
        self.now += self.SCAN_SECONDS / 3  # the clock is asked three times for each process
        return self.now

    def add(self, pids: Iterable[int], *, named: bool) -> None:
        """Let new processes begin, and KVM's uevents name them or not."""
        for pid in pids:
            directory = self.root / str(pid)
            directory.mkdir()
            (directory / "stat").write_text("nonsense")
            (directory / "status").write_text(f"Tgid:\t{pid}\n")
            if named:
                self.uevents.append(CREATE.replace(b"30373", str(pid).encode()))

    def find(self) -> list[int]:
        """Find VMs once, and return which processes were scanned for that, in this order."""
        self.scanned.clear()
        self.now += 1
        self.discovery.find_vms()
        return self.scanned


STRANGERS = range(1_900_000_000, 1_900_001_000)
NAMED = range(2_000_000_000, 2_000_000_300)


def test_whom_a_uevent_names_is_scanned_first_however_many_strangers_there_are(tmp_path: Path) -> None:
    crowd = CrowdedProc(tmp_path)
    crowd.add(STRANGERS, named=False)
    crowd.find()
    crowd.add([NAMED[0]], named=True)
    first, *others = crowd.find()
    assert first == NAMED[0]
    assert 0 < len(others) < 30
    # It is young: what it has next is found at once, too.
    assert crowd.find()[0] == NAMED[0]


def test_whoever_makes_vms_by_the_hundred_leaves_half_of_the_time_to_others(tmp_path: Path) -> None:
    crowd = CrowdedProc(tmp_path)
    crowd.add(STRANGERS, named=False)
    crowd.add(NAMED, named=True)
    scanned = crowd.find()
    named = sum(pid in NAMED for pid in scanned)
    assert 5 <= named < 30
    assert len(scanned) - named >= 5
