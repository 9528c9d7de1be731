"""How sources take turns, and how VMs get their ids; sources here are plain objects that say what they are told."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvm.counters.retried_source import RETRY_SECONDS
from kvm.discovery.processes import read_stat
from kvm.discovery.vm_discovery import Discovery, HeldVm
from kvm.errors import SourceUnavailable
from kvm.host.facts import read_host
from kvm.model import EXITS, Host, Identity, Owner, Protection, Snapshot, VmCounters, VmKey
from kvm.protection import judge_protection
from kvm.read_errors import ReadErrors
from kvm.snapshot import HostReader
from kvm.vm_budget import PROCESS_VMS
from tests.snapshots import INTEL

PID = os.getpid()
START = read_stat(Path("/proc"), PID).start_ticks
KEY = VmKey(PID, START, 4)
OTHER = VmKey(PID, START, 9)


class ToldSource:
    limits = ""

    def __init__(self, name: str, finds_vms: bool = False, unavailable: str = "") -> None:
        self.name, self.finds_vms, self.unavailable = name, finds_vms, unavailable
        self.answers: dict[VmKey, VmCounters] = {}
        self.asked: list[list[VmKey]] = []
        self.again: list[bool] = []
        self.opened = 0
        self.doubt = ""

    def open(self) -> None:
        self.opened += 1
        if self.unavailable:
            raise SourceUnavailable(self.unavailable, "mend it")

    def read(self, vms: Sequence[HeldVm], *, again: bool = False) -> Mapping[VmKey, VmCounters]:
        self.asked.append([vm.key for vm in vms])
        self.again.append(again)
        if self.unavailable:
            raise SourceUnavailable(self.unavailable, "mend it")
        return self.answers

    def close(self) -> None:
        self.opened = -1


class ToldDiscovery(Discovery):
    """Discovery whose list of VMs is told; everything else about it is the real one."""

    def __init__(self, *vms: HeldVm) -> None:
        super().__init__(Path("/proc"), lambda _pid, _kind, _message: None)
        self.vms = vms
        self.left_out = 0
        self.sees_first_process: bool | None = True
        self.again: list[set[int]] = []

    def find_vms(self) -> list[HeldVm]:
        return list(self.vms)

    @property
    def vms_left_out(self) -> int:
        return self.left_out

    def scan_again(self, pids: Iterable[int]) -> list[HeldVm]:
        self.again.append(set(pids))
        return [vm for vm in self.vms if vm.key.pid in self.again[-1] and vm.tid]


class Scene:
    def __init__(
        self,
        *sources: ToldSource,
        proc: Path = Path("/proc"),
        kvm_module: Path = Path("/nowhere"),
        read_host: Callable[[], Host] = read_host,
    ) -> None:
        self.now = 1000.0
        self.errors = ReadErrors()
        self.owners: dict[tuple[int, int], Owner] = {
            KEY[:2]: Owner("qemu", name="web", uuid="u-1", identity=Identity.LIBVIRT)
        }
        self.discovery = ToldDiscovery(hold(KEY))
        self.reader = HostReader(
            sources,
            self.discovery,
            lambda _wanted, _wait: self.owners,
            self.errors,
            proc=proc,
            kvm_module=kvm_module,
            kvm_device=kvm_module,
            read_host=read_host,
            monotonic=lambda: self.now,
            unix=lambda: 1.7e9 + time.clock_gettime(time.CLOCK_BOOTTIME),
        )

    def look(self, after_seconds: float = 1.0) -> Snapshot:
        self.now += after_seconds
        return self.reader.read()


def hold(key: VmKey, vcpu_ids: tuple[int, ...] | None = (0, 1)) -> HeldVm:
    return HeldVm(key, key.pid, -1, vcpu_ids, {})


def count(*exits: int, vcpu_ids: tuple[int, ...] = ()) -> VmCounters:
    vcpu_ids = vcpu_ids or tuple(range(len(exits)))
    return VmCounters(vcpu_ids, (None,) * len(exits), {EXITS: exits})


@pytest.fixture
def sources() -> Iterator[tuple[ToldSource, ToldSource]]:
    yield ToldSource("first"), ToldSource("second")


def test_the_first_source_that_reads_a_vm_is_its_source(sources: tuple[ToldSource, ToldSource]) -> None:
    first, second = sources
    scene = Scene(first, second)
    first.answers = {KEY: count(7, 8)}
    (reading,) = scene.look().readings
    assert (reading.source, reading.counters.per_vcpu[EXITS], reading.vcpu_count) == ("first", (7, 8), 2)
    assert second.asked == []
    assert [vcpu.index for vcpu in reading.vcpus] == [0, 1]


def test_the_next_source_is_asked_for_what_is_left(sources: tuple[ToldSource, ToldSource]) -> None:
    first, second = sources
    scene = Scene(first, second)
    scene.discovery.vms = (hold(KEY), hold(OTHER))
    first.answers = {KEY: VmCounters(problem="holds no fds"), OTHER: count(1, 2)}
    second.answers = {KEY: VmCounters((0, 1), (None, None), {}, {EXITS: 99})}
    by_key = {reading.vm.key: reading for reading in scene.look().readings}
    assert (by_key[KEY].source, by_key[OTHER].source) == ("second", "first")
    assert by_key[KEY].counters.totals == {EXITS: 99}
    assert second.asked == [[KEY]]


def test_a_vm_that_nobody_can_read_is_listed_with_its_vcpus_and_the_reason(
    sources: tuple[ToldSource, ToldSource],
) -> None:
    first, second = sources
    second.unavailable = "lockdown"
    scene = Scene(first, second)
    first.answers = {KEY: VmCounters(problem="holds no fds")}
    snapshot = scene.look()
    (reading,) = snapshot.readings
    assert (reading.source, reading.vcpus, reading.vcpu_count) == ("", (), 2)
    assert reading.counters.problem == "holds no fds"
    reports = [(report.source, report.up, report.reason, report.remedy) for report in snapshot.sources]
    assert reports == [("first", True, "", ""), ("second", False, "lockdown", "mend it")]


def test_a_vm_of_which_some_vcpus_were_read_has_their_numbers_and_the_count_of_all(
    sources: tuple[ToldSource, ToldSource],
) -> None:
    first, _second = sources
    scene = Scene(*sources)
    scene.discovery.vms = (hold(KEY, (0, 4, 8)),)
    first.answers = {KEY: count(5, 6, vcpu_ids=(0, 8))}
    (reading,) = scene.look().readings
    assert [(vcpu.index, vcpu.vcpu_id) for vcpu in reading.vcpus] == [(0, 0), (8, 8)]
    assert reading.vcpu_count == 3


def test_a_source_that_fails_is_left_alone_for_a_while_and_then_tried_again(
    sources: tuple[ToldSource, ToldSource],
) -> None:
    first, second = sources
    first.unavailable = "broken"
    second.answers = {KEY: count(1)}
    scene = Scene(first, second)
    for _ in range(3):
        assert scene.look().readings[0].source == "second"
    assert first.opened == 1
    first.unavailable, first.answers = "", {KEY: count(2)}
    snapshot = scene.look(RETRY_SECONDS)
    assert snapshot.readings[0].source == "first"
    assert [report.up for report in snapshot.sources] == [True, True]
    first.unavailable = "broken again"
    snapshot = scene.look()
    assert snapshot.readings[0].source == "second"
    assert (snapshot.sources[0].up, snapshot.sources[0].reason) == (False, "broken again")


def test_a_source_that_finds_vms_by_itself_has_the_word_alone(sources: tuple[ToldSource, ToldSource]) -> None:
    whole, second = ToldSource("whole", finds_vms=True), sources[1]
    scene = Scene(whole, second)
    whole.answers = {OTHER: VmCounters((0,), (PID,), {EXITS: (3,)}, notify_flags=1, notify_window_cycles=0)}
    (reading,) = scene.look().readings
    assert (reading.vm.key, reading.source, reading.vcpus[0].tid) == (OTHER, "whole", PID)
    assert second.asked == []
    assert second.opened == 1  # tried all the same: what works is known of all


def test_a_vm_that_ended_while_it_was_read_is_not_listed(sources: tuple[ToldSource, ToldSource]) -> None:
    scene = Scene(*sources)
    scene.discovery.vms = (HeldVm(KEY, 0, -1, (0, 1), {}),)  # another look finds it no more
    assert scene.look().readings == ()
    assert scene.discovery.again == [{PID}]
    assert sources[0].asked == [[KEY]]


def test_a_vm_whose_fds_changed_while_it_was_read_is_looked_at_again(sources: tuple[ToldSource, ToldSource]) -> None:
    first, _second = sources
    scene = Scene(*sources)
    (reading,) = scene.look().readings
    assert first.asked == [[KEY], [KEY]]
    assert first.again == [False, True]
    assert (reading.source, reading.counters.problem) == ("", "its fds change faster than they can be read")


def test_what_is_hidden_makes_the_look_incomplete(sources: tuple[ToldSource, ToldSource]) -> None:
    scene = Scene(*sources)
    sources[0].answers = {KEY: count(1)}
    assert scene.look().complete
    scene.discovery.sees_first_process = False
    assert not scene.look().complete
    scene.discovery.sees_first_process, scene.owners = True, {}
    scene.discovery.vms = (hold(KEY), hold(OTHER))
    assert not scene.look().complete


def test_proc_is_not_called_hidden_before_it_was_listed() -> None:
    source = ToldSource("bpf", finds_vms=True)
    source.doubt = "nothing has been read yet"
    scene = Scene(source)
    scene.discovery.sees_first_process = None
    assert [spot.reason for spot in scene.look().blind_spots] == ["no_source"]
    assert Discovery(Path("/proc"), lambda _pid, _kind, _message: None).sees_first_process is None


def test_a_source_is_up_only_when_it_has_read_something(sources: tuple[ToldSource, ToldSource]) -> None:
    first, _second = sources
    first.doubt = "nothing has been read yet"
    scene = Scene(first)
    first.answers = {KEY: count(7)}
    snapshot = scene.look()
    assert [(report.up, report.reason) for report in snapshot.sources] == [(False, "nothing has been read yet")]
    assert [spot.reason for spot in snapshot.blind_spots] == ["no_source"]
    first.doubt = ""
    snapshot = scene.look()
    assert snapshot.sources[0].up
    assert snapshot.complete


def test_a_vm_of_a_hidden_process_is_not_taken_for_one_that_has_ended(tmp_path: Path) -> None:
    """Where /proc is mounted with hidepid=2 it shows no directory of a process that is there."""
    source = ToldSource("bpf", finds_vms=True)
    source.answers = {KEY: count(7)}
    scene = Scene(source, proc=tmp_path)
    scene.owners = {}
    snapshot = scene.look()
    assert snapshot.readings == ()
    assert [spot.reason for spot in snapshot.blind_spots] == ["hidden_processes"]
    assert snapshot.is_blind
    ended = VmKey(2**22 + 1, 1, 9)  # no number that a process can have
    source.answers = {ended: count(7)}
    assert scene.look().complete


def test_an_agent_out_of_fds_does_not_say_that_processes_are_hidden() -> None:
    source = ToldSource("bpf", finds_vms=True)
    scene = Scene(source)
    assert scene.look().complete
    source.answers, scene.owners = {KEY: count(7)}, {}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), hard))
        try:
            snapshot = scene.look()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [spot.reason for spot in snapshot.blind_spots] == ["owners_pending"]


def test_vms_of_which_none_can_be_read_leave_the_agent_blind(sources: tuple[ToldSource, ToldSource]) -> None:
    first, _second = sources
    scene = Scene(*sources)
    first.answers = {KEY: VmCounters(problem="its VMM holds no stats fds")}
    snapshot = scene.look()
    assert (snapshot.complete, snapshot.is_blind) == (True, True)
    first.answers = {KEY: count(7)}
    assert not scene.look().is_blind


def test_a_module_that_comes_is_noticed_at_once(tmp_path: Path) -> None:
    module = tmp_path / "kvm"
    source = ToldSource("first", unavailable="KVM is not loaded")
    scene = Scene(source, kvm_module=module)
    assert not scene.look().sources[0].up
    opened = source.opened
    source.unavailable = ""
    assert not scene.look().sources[0].up
    assert source.opened == opened, "it is not tried anew at each snapshot"
    changes = scene.look().kvm_changes
    module.mkdir()
    snapshot = scene.look()
    assert (snapshot.sources[0].up, snapshot.kvm_changes) == (True, changes + 1)
    assert scene.look().kvm_changes == changes + 1


def test_where_kvm_comes_and_goes_every_source_is_tried_anew_also_behind_one_that_reads_all(tmp_path: Path) -> None:
    module, no_kvm = tmp_path / "kvm", "KVM is not loaded"
    sources = [ToldSource("bpf", finds_vms=True, unavailable=no_kvm), ToldSource("stats_fd", unavailable=no_kvm)]
    scene = Scene(*sources, kvm_module=module)
    for works in (False, True, False, True):
        if works:
            module.mkdir()
        elif module.exists():
            module.rmdir()
        for source in sources:
            source.unavailable = "" if works else no_kvm
        assert [source.up for source in scene.look().sources] == [works, works]
        assert [source.up for source in scene.look().sources] == [works, works]
    assert [source.opened for source in sources] == [1, 1]  # closed in between, and opened once


def test_a_cpu_that_is_not_known_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(read_host=partial(read_host, tmp_path))
    for _ in range(3):
        scene.look(after_seconds=RETRY_SECONDS)
    told = [record for record in caplog.records if "CPU and microcode" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]


def test_what_does_not_change_is_the_same_object(sources: tuple[ToldSource, ToldSource]) -> None:
    first, _second = sources
    scene = Scene(*sources)
    first.answers = {KEY: count(7, 8)}
    (one,), (two,) = scene.look().readings, scene.look().readings
    assert one.vm is two.vm
    assert one.vcpus is two.vcpus


def test_a_vm_that_stands_still_has_the_same_reading_until_something_of_it_changes(tmp_path: Path) -> None:
    whole, host = ToldSource("whole", finds_vms=True), replace(INTEL, notify_supported=True)
    scene = Scene(whole, kvm_module=tmp_path / "kvm", read_host=lambda: host)
    whole.answers = {KEY: VmCounters((0,), (PID,), {EXITS: (3,)})}
    (one,), (two,) = scene.look().readings, scene.look().readings
    assert one is two
    host = replace(INTEL, notify_supported=False)
    (tmp_path / "kvm").mkdir()  # another KVM: the host is read anew
    (three,) = scene.look().readings
    assert three.protection is Protection.UNSUPPORTED
    whole.answers = {KEY: VmCounters((0,), (PID,), {EXITS: (4,)})}
    (four,) = scene.look().readings
    assert four.counters.per_vcpu == {EXITS: (4,)}


def test_a_vm_whose_owner_is_not_known_yet_is_left_out_and_counted(sources: tuple[ToldSource, ToldSource]) -> None:
    scene = Scene(*sources)
    sources[0].answers = {KEY: count(1)}
    scene.owners = {}
    snapshot = scene.look()
    assert snapshot.readings == ()
    assert snapshot.errors == {("owners", "pending"): 1}
    assert not snapshot.complete


def test_a_clone_keeps_both_apart_and_says_so(sources: tuple[ToldSource, ToldSource]) -> None:
    scene = Scene(*sources)
    scene.discovery.vms = (hold(KEY), hold(OTHER))
    sources[0].answers = {KEY: count(1), OTHER: count(2)}
    snapshot = scene.look()
    assert [reading.vm.id for reading in snapshot.readings] == ["u-1", f"u-1-{PID}"]
    assert snapshot.errors == {("owners", "duplicate"): 1}
    scene.discovery.vms = (hold(OTHER),)
    sources[0].answers = {OTHER: count(2)}
    assert [reading.vm.id for reading in scene.look().readings] == [f"u-1-{PID}"]  # an id is kept for life


@pytest.mark.parametrize(
    ("supported", "flags", "protection"),
    [
        (True, 1, Protection.ARMED),
        (True, 3, Protection.ARMED),
        (True, 0, Protection.OFF),
        (True, 2, Protection.OFF),
        (True, None, Protection.UNKNOWN),
        (None, None, Protection.UNKNOWN),
        (None, 1, Protection.ARMED),
        (None, 0, Protection.UNKNOWN),
        (False, None, Protection.UNSUPPORTED),
        (False, 0, Protection.UNSUPPORTED),
    ],
)
def test_protection(supported: bool | None, flags: int | None, protection: Protection) -> None:
    assert judge_protection(supported, flags) is protection


def test_vms_over_budget_are_not_read_and_those_beyond_the_scan_count_too() -> None:
    """Without a source that finds VMs itself: what is over budget costs nothing more."""
    source = ToldSource("stats_fd")
    scene = Scene(source)
    scene.discovery.vms = tuple(hold(VmKey(PID, START, fd)) for fd in range(PROCESS_VMS + 10))
    scene.discovery.left_out = 7
    snapshot = scene.look()
    assert len(source.asked[0]) == PROCESS_VMS
    assert snapshot.vms_over_budget == 17
    assert "over_budget" in {spot.reason for spot in snapshot.blind_spots}
    assert not snapshot.complete


def test_a_source_that_finds_vms_itself_is_held_to_the_budget_alone() -> None:
    source = ToldSource("bpf", finds_vms=True)
    source.answers = {VmKey(PID, START, fd): count(1) for fd in range(PROCESS_VMS + 10)}
    scene = Scene(source)
    scene.discovery.left_out = 7
    assert scene.look().vms_over_budget == 10
