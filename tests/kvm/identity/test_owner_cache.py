"""The cache of owners: what it remembers, and that a process that hangs costs nobody else anything."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kvm.discovery.processes import read_stat
from kvm.identity.owner_cache import OwnerCache
from kvm.identity.owners import read_program
from kvm.model import Identity, Owner
from tests.capture_fixtures import imitated_vmm
from tests.fake_proc import LATE, START_TICKS, UID, FakeProc
from tests.waiting import PATIENCE_SECONDS, wait_until

Errors = list[tuple[int, str, str]]


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    (tmp_path / "proc").mkdir()
    return FakeProc(tmp_path / "proc")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def errors() -> Errors:
    return []


TERMINA = Owner("crosvm", name="termina", identity=Identity.CMDLINE, uid=UID)
# What is known of a QEMU whose command line cannot be read.
FALLBACK = Owner("qemu", uid=UID)

Make = Callable[..., OwnerCache]


@pytest.fixture
def make_cache(proc: FakeProc, errors: Errors) -> Iterator[Make]:
    caches = []

    def make(clock: Callable[[], float] = time.monotonic, give_up_seconds: float = 10.0) -> OwnerCache:
        cache = OwnerCache(
            lambda *error: errors.append(error),
            proc=proc.path,
            libvirt_directories=(),
            clock=clock,
            give_up_seconds=give_up_seconds,
        )
        caches.append(cache)
        return cache

    yield make
    for cache in caches:
        cache.close()
    wait_until(lambda: not find_children(), "no lookup process stays")


def find_children() -> list[psutil.Process]:
    """The lookup processes that live."""
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_cache_reads_once_and_forgets(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    pid = proc.add("firecracker", 10)
    cache = make_cache()
    key = (pid, START_TICKS)
    known = {key: Owner("firecracker", name="web-7", own_id="web-7", identity=Identity.CMDLINE, uid=UID)}
    assert cache.find({key: pid}, PATIENCE_SECONDS) == known
    proc.cmdline(pid).write_bytes(b"firecracker\0--id\0other\0")
    assert cache.find({key: pid}, 0.0) == known
    assert cache.find({}, 0.0) == {}
    assert cache.find({key: pid}, PATIENCE_SECONDS)[key].own_id == "other"
    assert errors == []


def test_many_processes_at_once(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    for pid in range(100, 400):
        proc.add("crosvm", pid)
    cache = make_cache()
    wanted = {(pid, START_TICKS): pid for pid in range(100, 400)}
    assert cache.find(wanted, PATIENCE_SECONDS) == dict.fromkeys(wanted, TERMINA)


def test_hung_process_delays_nobody(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    clock = Clock()
    cache = make_cache(clock)
    hung, well, later = proc.add("qemu", 10), proc.add("crosvm", 11), proc.add("firecracker", 12)
    hung_key, well_key, later_key = ((pid, START_TICKS) for pid in (hung, well, later))
    proc.hang(hung)
    wanted = {hung_key: hung, well_key: well}
    wait_until(lambda: cache.find(wanted, 0.0) == {well_key: TERMINA})
    answer = proc.hold(hung)  # so its child has begun
    cache.find(wanted, 0.0)
    wanted[later_key] = later
    clock.seconds += 9.9
    wait_until(lambda: cache.find(wanted, 0.0).keys() == {well_key, later_key})
    assert errors == []
    clock.seconds += 0.2
    assert cache.find(wanted, 0.0)[hung_key] == FALLBACK
    assert [(pid, kind) for pid, kind, _ in errors] == [(hung, "hung")]
    # It would answer after all: what it is called does not change any more.
    with contextlib.suppress(BrokenPipeError), answer:
        answer.write(LATE)
    wait_until(lambda: len(find_children()) == 1)
    assert cache.find(wanted, 0.0)[hung_key] == FALLBACK
    assert len(errors) == 1


def test_hung_process_delays_only_its_first_look(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    cache = make_cache()
    pid = proc.add("qemu", 10)
    proc.hang(pid)
    wanted = {(pid, START_TICKS): pid}
    began = time.monotonic()
    assert cache.find(wanted, 0.2) == {}
    assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    assert cache.find(wanted, PATIENCE_SECONDS) == {}
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    proc.release(pid)
    wait_until(lambda: cache.find(wanted, 0.0))


@pytest.fixture
def slow_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make Python, where it is started from now on, take so many seconds longer to start, or for ever."""

    def make(seconds: float) -> None:
        python = tmp_path / "slow-python"
        exec_ = "exec " if seconds == float("inf") else ""  # what is killed is all that there is
        python.write_text(f'#!/bin/sh\n{exec_}sleep {seconds}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return make


@pytest.mark.parametrize("give_up_seconds", [10.0, OwnerCache.STUCK_SECONDS])
def test_a_child_that_starts_slowly_is_waited_for(
    proc: FakeProc, errors: Errors, make_cache: Make, slow_python: Callable[[float], None], give_up_seconds: float
) -> None:
    """On a busy machine Python takes its time, and under emulation many seconds: that is no hung lookup."""
    slow_python(4 * OwnerCache.STUCK_SECONDS)
    wanted = {(pid, START_TICKS): proc.add("crosvm", pid) for pid in range(200, 204)}
    cache = make_cache(give_up_seconds=give_up_seconds)
    assert cache.find(wanted, PATIENCE_SECONDS) == dict.fromkeys(wanted, TERMINA)
    assert errors == []


def test_those_whose_turn_has_not_come_are_waited_for_again(proc: FakeProc, make_cache: Make) -> None:
    """An agent that starts where thousands of VMs run has the owners of many in each snapshot, not of one or two."""
    wanted = {(pid, START_TICKS): proc.add("crosvm", pid) for pid in range(200, 260)}
    cache = make_cache()
    assert len(cache.find(wanted, 0.0)) < len(wanted)
    found = cache.find(wanted, PATIENCE_SECONDS)
    assert len(wanted) - len(found) <= OwnerCache.BUSY_CHILDREN  # whose turn has come is not waited for again


def test_where_no_child_can_be_started_nobody_waits_again(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    wanted = {(pid, START_TICKS): proc.add("crosvm", pid) for pid in (200, 201)}
    cache, (soft, hard) = make_cache(), resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, hard))
    try:
        assert cache.find(wanted, 0.0) == {}
        began = time.monotonic()
        assert cache.find(wanted, PATIENCE_SECONDS) == {}
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {kind for _, kind, _ in errors} == {"unstarted"}
    cache.find(wanted, 0.0)
    assert cache.children  # now that there are fds


def test_where_no_child_starts_that_is_said(
    proc: FakeProc, errors: Errors, make_cache: Make, slow_python: Callable[[float], None]
) -> None:
    slow_python(float("inf"))
    clock = Clock()
    pid, cache = proc.add("qemu", 200), make_cache(clock)
    key = (pid, START_TICKS)
    for _ in range(OwnerCache.TRIES):
        assert cache.find({key: pid}, 0.0) == {}
        assert cache.children <= OwnerCache.CHILDREN  # on a busy machine one that was killed takes a while to end
        clock.seconds += OwnerCache.START_SECONDS
    assert cache.find({key: pid}, 0.0) == {key: FALLBACK}
    assert [(at, kind) for at, kind, _ in errors] == [(pid, "unreadable")]
    assert "did not start within 60 s" in errors[0][2]


def test_new_processes_of_who_makes_look_ups_hang_are_not_waited_for(proc: FakeProc, make_cache: Make) -> None:
    cache = make_cache()
    hung = [proc.add("qemu", pid) for pid in range(100, 104)]
    for pid in hung:
        proc.set_uid(pid, 1000)
        proc.hang(pid)
    wanted = {(hung[0], START_TICKS): hung[0]}
    assert cache.find(wanted, 2 * OwnerCache.STUCK_SECONDS) == {}
    for pid in hung[1:]:
        wanted[pid, START_TICKS] = pid
        began = time.monotonic()
        assert cache.find(wanted, PATIENCE_SECONDS) == {}
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
    honest = proc.add("crosvm", 200)
    wanted[honest, START_TICKS] = honest
    assert cache.find(wanted, PATIENCE_SECONDS) == {(honest, START_TICKS): TERMINA}


def test_who_makes_look_ups_hang_holds_up_nobody_of_another_uid(
    proc: FakeProc, errors: Errors, make_cache: Make
) -> None:
    clock = Clock()
    cache = make_cache(clock, give_up_seconds=1e6)
    hung = list(range(100, 133))
    for pid in hung:
        proc.add("qemu", pid)
        proc.set_uid(pid, 1000)
        proc.hang(pid)
    wanted = {(pid, START_TICKS): pid for pid in hung}

    def find_later(seconds: float) -> dict[tuple[int, int], Owner]:
        clock.seconds += seconds
        return cache.find(wanted, 0.0)

    for _ in range(20):
        assert find_later(OwnerCache.STUCK_SECONDS) == {}
        assert cache.children <= OwnerCache.CHILDREN_OF_A_UID
    honest = proc.add("crosvm", 200)
    wanted[honest, START_TICKS] = honest
    wait_until(lambda: find_later(OwnerCache.STUCK_SECONDS))
    assert find_later(0.0) == {(honest, START_TICKS): TERMINA}
    # A lookup that has not begun is never given up on: let them answer, and each has its name.
    assert errors == []
    proc.release(*hung)
    wait_until(lambda: find_later(OwnerCache.STUCK_SECONDS).keys() == wanted.keys())
    names = {owner.name for (pid, _), owner in find_later(0.0).items() if pid != honest}
    assert names == {"late"}
    assert errors == []


def test_many_uids_that_hang_leave_room_once_they_are_given_up_on(
    proc: FakeProc, errors: Errors, make_cache: Make
) -> None:
    clock = Clock()
    cache = make_cache(clock)
    hung = list(range(100, 100 + OwnerCache.CHILDREN + 5))
    for pid in hung:
        proc.add("qemu", pid)
        proc.set_uid(pid, 1000 + pid)
        proc.hang(pid)
    wanted = {(pid, START_TICKS): pid for pid in hung}

    def find_later(seconds: float) -> dict[tuple[int, int], Owner]:
        clock.seconds += seconds
        return cache.find(wanted, 0.0)

    # The clock is as slow as a real one: children take their time to start.
    wait_until(lambda: find_later(0.01) == {} and cache.children >= OwnerCache.CHILDREN)
    assert cache.children == OwnerCache.CHILDREN
    wait_until(lambda: find_later(1.0).keys() == wanted.keys())
    assert sorted(pid for pid, _, _ in errors) == hung
    assert {kind for _, kind, _ in errors} == {"hung"}


def test_a_child_that_dies_is_replaced(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    cache = make_cache()
    first, second = proc.add("crosvm", 10), proc.add("firecracker", 11)
    assert cache.find({(first, START_TICKS): first}, PATIENCE_SECONDS)
    (child,) = find_children()
    child.kill()
    wait_until(lambda: not find_children())
    wanted = {(first, START_TICKS): first, (second, START_TICKS): second}
    assert cache.find(wanted, PATIENCE_SECONDS).keys() == wanted.keys()
    assert errors == []


def test_an_idle_child_that_has_died_is_replaced_at_once(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    cache = make_cache()
    first, second = proc.add("crosvm", 10), proc.add("firecracker", 11)
    assert cache.find({(first, START_TICKS): first}, PATIENCE_SECONDS)
    (dead,) = find_children()
    dead.kill()
    wait_until(lambda: not find_children())
    cache.find({(second, START_TICKS): second}, 0.0)
    assert [child != dead for child in find_children()] == [True]
    assert errors == []


class Unkillable:
    """A lookup process that was killed and lives on, as one that hangs in the kernel; ``end`` lets it go."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def open_pidfd(self) -> int:
        return os.pidfd_open(self._process.pid)

    def wait(self, seconds: float) -> None:
        assert seconds >= 0.0

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


def test_whoever_waits_for_room_is_woken_when_a_killed_child_ends(
    proc: FakeProc, errors: Errors, make_cache: Make
) -> None:
    cache = make_cache()
    cache.STUCK_SECONDS = PATIENCE_SECONDS
    unkillable = [Unkillable() for _ in range(cache.CHILDREN)]
    cache._left_behind = [(process, 1000 + number) for number, process in enumerate(unkillable)]  # type: ignore[misc]
    pid = proc.add("crosvm", 10)
    timer = threading.Timer(0.2, unkillable[0].end)
    timer.start()
    try:
        fds = set(os.listdir("/proc/self/fd"))
        began = time.monotonic()
        assert cache.find({(pid, START_TICKS): pid}, PATIENCE_SECONDS) == {(pid, START_TICKS): TERMINA}
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
        assert len(set(os.listdir("/proc/self/fd")) - fds) <= 3  # the child's two pipes, and the listing's own
    finally:
        timer.join()
        for process in unkillable:
            process.end()
        wait_until(lambda: all(process.has_ended for process in unkillable))
    assert errors == []


def test_a_process_that_kills_children_is_given_up_on(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    cache = make_cache()
    pid = proc.add("qemu", 10)
    proc.hang(pid)
    wanted = {(pid, START_TICKS): pid}
    for _ in range(OwnerCache.TRIES):
        assert cache.find(wanted, 0.0) == {}
        with proc.hold(pid):
            (child,) = find_children()
            child.kill()
            wait_until(lambda: not find_children())
    assert cache.find(wanted, 0.0) == {(pid, START_TICKS): FALLBACK}
    assert [(told, kind) for told, kind, _ in errors] == [(pid, "unreadable")]


def test_closing_waits_for_nothing_that_hangs(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    cache = make_cache()
    pid = proc.add("qemu", 10)
    proc.hang(pid)
    assert cache.find({(pid, START_TICKS): pid}, 0.0) == {}
    with proc.hold(pid):
        began = time.monotonic()
        cache.close()
        assert time.monotonic() - began < PATIENCE_SECONDS / 10
    assert errors == []


def test_forgotten_while_it_hangs(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    clock = Clock()
    cache = make_cache(clock)
    pid = proc.add("qemu", 10)
    proc.hang(pid)
    assert cache.find({(pid, START_TICKS): pid}, 0.0) == {}
    with proc.hold(pid):
        assert cache.find({}, 0.0) == {}
        clock.seconds += 100.0
        assert cache.find({}, 0.0) == {}
        wait_until(lambda: not find_children())
    assert errors == []


def test_another_process_of_the_same_number(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    pid = proc.add("crosvm", 10)
    cache = make_cache()
    assert cache.find({(pid, START_TICKS - 1): pid}, PATIENCE_SECONDS) == {}
    key = (pid, START_TICKS)
    assert cache.find({key: pid}, PATIENCE_SECONDS) == {key: TERMINA}
    assert errors == []


def test_process_that_seems_to_be_ending_is_asked_again(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    pid = proc.add("crosvm", 10)
    exe = proc.cmdline(pid).parent / "exe"
    target, content = exe.readlink(), proc.cmdline(pid).read_bytes()
    exe.unlink()
    proc.cmdline(pid).write_bytes(b"")
    cache = make_cache()
    wanted = {(pid, START_TICKS): pid}
    assert cache.find(wanted, PATIENCE_SECONDS) == {}
    exe.symlink_to(target)
    proc.cmdline(pid).write_bytes(content)
    wait_until(lambda: cache.find(wanted, 0.0))
    assert errors == []


def test_problems_are_told_once(proc: FakeProc, errors: Errors, make_cache: Make) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a").write_bytes(b"<")
    cache = make_cache()
    wanted = {(pid, START_TICKS): pid}
    for _ in range(3):
        assert cache.find(wanted, PATIENCE_SECONDS)
    assert [(told, kind) for told, kind, _ in errors] == [(pid, "malformed")]


def test_real_process_through_the_cache(tmp_path: Path, errors: Errors) -> None:
    cache = OwnerCache(lambda *error: errors.append(error), libvirt_directories=())
    with contextlib.closing(cache), imitated_vmm(tmp_path / "firecracker", ["./firecracker", "--id", "real"]) as pid:
        key = (pid, read_stat(Path("/proc"), pid).start_ticks)
        assert cache.find({key: pid}, PATIENCE_SECONDS)[key].own_id == "real"
        assert cache.find({key: pid}, 0.0)[key].uid == os.getuid()
        assert read_program(Path("/proc"), pid, pid) == ("firecracker", str(tmp_path / "firecracker"))
    assert errors == []
