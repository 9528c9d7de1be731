"""The cache of owners: what it remembers, and that a process that hangs costs nobody else anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm.discovery.processes import read_stat
from kvm.identity.owner_cache import OwnerCache
from kvm.identity.owners import read_program
from kvm.model import Owner
from tests.capture_fixtures import imitated_vmm
from tests.fake_proc import START_TICKS, FakeProc, owner_threads
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


def make_cache(
    proc: FakeProc, errors: Errors, clock: Callable[[], float] = time.monotonic, give_up_seconds: float = 10.0
) -> OwnerCache:
    return OwnerCache(
        lambda *error: errors.append(error),
        proc=proc.path,
        libvirt_directories=(),
        clock=clock,
        give_up_seconds=give_up_seconds,
    )


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    wait_until(lambda: not owner_threads())


def test_cache_reads_once_and_forgets(proc: FakeProc, errors: Errors) -> None:
    pid = proc.add("firecracker", 10)
    cache = make_cache(proc, errors)
    key = (pid, START_TICKS)
    known = {key: Owner("firecracker", name="web-7", own_id="web-7")}
    assert cache.find({key: pid}, PATIENCE_SECONDS) == known
    proc.cmdline(pid).write_bytes(b"firecracker\0--id\0other\0")
    assert cache.find({key: pid}, 0.0) == known
    assert cache.find({}, 0.0) == {}
    assert cache.find({key: pid}, PATIENCE_SECONDS)[key].own_id == "other"
    assert errors == []


def test_many_processes_at_once(proc: FakeProc, errors: Errors) -> None:
    for pid in range(100, 400):
        proc.add("crosvm", pid)
    cache = make_cache(proc, errors)
    wanted = {(pid, START_TICKS): pid for pid in range(100, 400)}
    assert cache.find(wanted, PATIENCE_SECONDS) == dict.fromkeys(wanted, Owner("crosvm", name="termina"))


def test_hung_process_delays_nobody(proc: FakeProc, errors: Errors) -> None:
    clock = Clock()
    cache = make_cache(proc, errors, clock)
    hung, well, later = proc.add("qemu", 10), proc.add("crosvm", 11), proc.add("firecracker", 12)
    hung_key, well_key, later_key = ((pid, START_TICKS) for pid in (hung, well, later))
    proc.hang(hung)
    wanted = {hung_key: hung, well_key: well}
    wait_until(lambda: cache.find(wanted, 0.0) == {well_key: Owner("crosvm", name="termina")})
    answer = proc.hold(hung)
    wanted[later_key] = later
    clock.seconds += 9.9
    wait_until(lambda: cache.find(wanted, 0.0).keys() == {well_key, later_key})
    assert errors == []
    clock.seconds += 0.2
    assert cache.find(wanted, 0.0)[hung_key] == Owner("qemu")
    assert [(pid, kind) for pid, kind, _ in errors] == [(hung, "hung")]
    # It answers after all: what it is called does not change any more, and the thread ends.
    wait_until(lambda: len(owner_threads()) == 1)
    answer.write(b"qemu-system-x86_64\0-name\0late\0")
    answer.close()
    wait_until(lambda: not owner_threads())
    assert cache.find(wanted, 0.0)[hung_key] == Owner("qemu")
    assert len(errors) == 1


def test_hung_process_delays_only_its_first_look(proc: FakeProc, errors: Errors) -> None:
    cache = make_cache(proc, errors)
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


def test_more_hung_processes_than_threads(proc: FakeProc, errors: Errors) -> None:
    clock = Clock()
    cache = make_cache(proc, errors, clock, give_up_seconds=1e6)
    hung = list(range(100, 100 + OwnerCache.THREADS + 3))
    for pid in hung:
        proc.add("qemu", pid)
        proc.hang(pid)
    wanted = {(pid, START_TICKS): pid for pid in hung}

    def find_later(seconds: float) -> dict[tuple[int, int], Owner]:
        clock.seconds += seconds
        return cache.find(wanted, 0.0)

    wait_until(lambda: find_later(OwnerCache.STUCK_SECONDS) == {} and len(owner_threads()) == OwnerCache.THREADS)
    assert find_later(OwnerCache.STUCK_SECONDS) == {}
    assert len(owner_threads()) == OwnerCache.THREADS
    # Each is given up on a while after it was begun with, and those that no thread is left for with them.
    wait_until(lambda: find_later(1e6).keys() == wanted.keys())
    assert sorted(pid for pid, _, _ in errors) == hung
    assert {kind for _, kind, _ in errors} == {"hung"}
    proc.release(*hung)


def test_forgotten_while_it_hangs(proc: FakeProc, errors: Errors) -> None:
    clock = Clock()
    cache = make_cache(proc, errors, clock)
    pid = proc.add("qemu", 10)
    proc.hang(pid)
    assert cache.find({(pid, START_TICKS): pid}, 0.0) == {}
    wait_until(owner_threads)
    assert cache.find({}, 0.0) == {}
    clock.seconds += 100.0
    assert cache.find({}, 0.0) == {}
    proc.release(pid)
    assert errors == []


def test_another_process_of_the_same_number(proc: FakeProc, errors: Errors) -> None:
    pid = proc.add("crosvm", 10)
    cache = make_cache(proc, errors)
    assert cache.find({(pid, START_TICKS - 1): pid}, PATIENCE_SECONDS) == {}
    key = (pid, START_TICKS)
    assert cache.find({key: pid}, PATIENCE_SECONDS) == {key: Owner("crosvm", name="termina")}
    assert errors == []


def test_process_that_seems_to_be_ending_is_asked_again(proc: FakeProc, errors: Errors) -> None:
    pid = proc.add("crosvm", 10)
    exe = proc.cmdline(pid).parent / "exe"
    target, content = exe.readlink(), proc.cmdline(pid).read_bytes()
    exe.unlink()
    proc.cmdline(pid).write_bytes(b"")
    cache = make_cache(proc, errors)
    wanted = {(pid, START_TICKS): pid}
    assert cache.find(wanted, PATIENCE_SECONDS) == {}
    exe.symlink_to(target)
    proc.cmdline(pid).write_bytes(content)
    wait_until(lambda: cache.find(wanted, 0.0))
    assert errors == []


def test_problems_are_told_once(proc: FakeProc, errors: Errors) -> None:
    pid = proc.add("libvirt-openstack")
    proc.add_status(pid, "libvirt-openstack", "instance-0000002a").write_bytes(b"<")
    cache = make_cache(proc, errors)
    wanted = {(pid, START_TICKS): pid}
    for _ in range(3):
        assert cache.find(wanted, PATIENCE_SECONDS)
    assert [(told, kind) for told, kind, _ in errors] == [(pid, "malformed")]


def test_real_process_through_the_cache(tmp_path: Path, errors: Errors) -> None:
    cache = OwnerCache(lambda *error: errors.append(error), libvirt_directories=())
    with imitated_vmm(tmp_path / "firecracker", ["./firecracker", "--id", "real"]) as pid:
        key = (pid, read_stat(Path("/proc"), pid).start_ticks)
        assert cache.find({key: pid}, PATIENCE_SECONDS)[key].own_id == "real"
        assert read_program(Path("/proc"), pid, pid) == ("firecracker", str(tmp_path / "firecracker"))
    assert errors == []
