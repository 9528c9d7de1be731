"""The debugfs source on simulated trees; tests/live and the kernel lab have the real ones."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.counters.debugfs import (
    DebugfsSource,
    explain_refusal,
    find_vcpu_ids,
    find_vm_directory,
    may_hold_vms,
    parse_counter,
    read_vcpu_tids,
)
from kvm.discovery.vm_discovery import HeldVm
from kvm.errors import MalformedData, SourceUnavailable
from kvm.host.lockdown import Lockdown
from kvm.host.privileges import Privileges
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, VmKey

WANTED = (NOTIFY_WINDOW_EXITS, EXITS)
KEY = VmKey(1000, 5, 9)


class Troubles(list[tuple[VmKey, str, str]]):
    def tell(self, whose: VmKey, kind: str, message: str) -> None:
        self.append((whose, kind, message))


def held(key: VmKey) -> HeldVm:
    return HeldVm(key, key.pid, -1, (0, 1), {})


def make_vm(kvm: Path, name: str, notify: str = "7\n", exits: str = "1000\n") -> Path:
    directory = kvm / name
    for vcpu_id, tid in ((0, 1001), (2, 1002), (4, 0)):
        (directory / f"vcpu{vcpu_id}").mkdir(parents=True)
        (directory / f"vcpu{vcpu_id}" / "pid").write_text(f"{tid}\n")
    (directory / NOTIFY_WINDOW_EXITS).write_text(notify)
    (directory / EXITS).write_text(exits)
    return directory


def make_proc(proc: Path, *threads: int) -> Path:
    for tid in threads:
        (proc / str(KEY.pid) / "task" / str(tid)).mkdir(parents=True)
    return proc


def test_where_nothing_may_be_looked_into_no_directory_is_found_and_vms_may_be_held(tmp_path: Path) -> None:
    barred = tmp_path / ("n" * 300)  # as good as EACCES, which root never gets
    assert find_vm_directory(barred, tmp_path, KEY) is None
    assert may_hold_vms(barred, tmp_path, [KEY.pid])
    make_vm(tmp_path / "kvm", "1000-9")
    assert may_hold_vms(tmp_path / "kvm", barred, [KEY.pid])


def test_a_vm_is_its_directory_and_no_other_that_looks_like_it(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", 1000, 1007)
    kvm = tmp_path / "kvm"
    for name in ("11000-9", "1000-99", "1000-9-x", "1007-8", "2007-9"):
        make_vm(kvm, name)
    assert find_vm_directory(kvm, proc, KEY) is None
    other_thread = make_vm(kvm, "1007-9")
    assert find_vm_directory(kvm, proc, KEY) == other_thread
    usual = make_vm(kvm, "1000-9")
    assert find_vm_directory(kvm, proc, KEY) == usual
    assert find_vm_directory(tmp_path / "nowhere", proc, KEY) is None


def test_sums_and_vcpus_are_read(tmp_path: Path) -> None:
    directory = make_vm(tmp_path / "kvm", "1000-9")
    source = DebugfsSource(WANTED, tmp_path / "kvm", make_proc(tmp_path / "proc", 1000), Troubles().tell)
    counters = source.read([held(KEY)])[KEY]
    assert dict(counters.totals) == {NOTIFY_WINDOW_EXITS: 7, EXITS: 1000}
    assert counters.vcpu_ids == (0, 2, 4)
    assert counters.per_vcpu == {}
    assert find_vcpu_ids(directory) == (0, 2, 4)
    assert read_vcpu_tids(directory) == {0: 1001, 2: 1002}  # 4 has not run yet


def test_a_vm_that_makes_no_sense_costs_only_itself(tmp_path: Path) -> None:
    troubles = Troubles()
    other = VmKey(1000, 5, 10)
    make_vm(tmp_path / "kvm", "1000-9", notify="many\n")
    make_vm(tmp_path / "kvm", "1000-10")
    source = DebugfsSource(WANTED, tmp_path / "kvm", make_proc(tmp_path / "proc", 1000), troubles.tell)
    readings = source.read([held(KEY), held(other)])
    assert readings[KEY].totals == {}
    assert "many" in readings[KEY].problem
    assert [(whose.pid, kind) for whose, kind, _message in troubles] == [(1000, "malformed")]
    assert readings[other].totals[NOTIFY_WINDOW_EXITS] == 7


def test_a_vm_that_ends_has_no_entry_and_one_without_directory_says_so(tmp_path: Path) -> None:
    proc = make_proc(tmp_path / "proc", 1000)
    directory = make_vm(tmp_path / "kvm", "1000-9")
    source = DebugfsSource(WANTED, tmp_path / "kvm", proc, Troubles().tell)
    assert KEY in source.read([held(KEY)])
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
    assert source.read([held(KEY)]) == {}
    assert "no debugfs directory" in source.read([held(KEY)])[KEY].problem


def test_a_hidden_process_may_hold_a_vm_only_if_it_may_have_made_one(tmp_path: Path) -> None:
    proc, kvm = make_proc(tmp_path / "proc", 1000, 1007), tmp_path / "kvm"
    (proc / "1007").mkdir()
    assert may_hold_vms(kvm, proc, [1000])  # no debugfs: nobody knows
    assert not may_hold_vms(kvm, proc, [])
    make_vm(kvm, "1007-9")
    assert may_hold_vms(kvm, proc, [1000])
    assert not may_hold_vms(kvm, proc, [1])
    make_vm(kvm, "4711-3")  # its maker is gone
    assert may_hold_vms(kvm, proc, [1])


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    sysfs, security = tmp_path / "sys", tmp_path / "sys/kernel/security"
    security.mkdir(parents=True)
    (security / "lockdown").write_text("[none] integrity confidentiality\n")
    source = DebugfsSource(WANTED, tmp_path / "kvm", tmp_path / "proc", Troubles().tell, sysfs)
    with pytest.raises(SourceUnavailable) as foreign:
        source.open()
    assert foreign.value.remedy == "run with hostPID: true"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "self").symlink_to("/proc/self")
    with pytest.raises(SourceUnavailable) as unmounted:
        source.open()
    assert "mount -t debugfs" in unmounted.value.remedy
    (security / "lockdown").write_text("none [integrity] confidentiality\n")
    with pytest.raises(SourceUnavailable, match="lockdown forbids reading counters") as closed:
        source.open()
    assert closed.value.remedy == ""
    (tmp_path / "kvm").mkdir()
    with pytest.raises(SourceUnavailable) as too_old:
        source.open()
    assert "6.0" in too_old.value.remedy
    (tmp_path / "kvm" / NOTIFY_WINDOW_EXITS).write_text("0\n")
    source.open()


UNRESTRICTED = Privileges(uid=0, capabilities=2**41 - 1, initial_user_namespace=True, is_seccomp_filtered=False)
EPERM = PermissionError(errno.EPERM, "Operation not permitted")
UNKNOWN = Lockdown("", "securityfs is not mounted")


@pytest.mark.parametrize(
    ("err", "lockdown", "privileges", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), Lockdown("integrity"), UNRESTRICTED, "may not be read"),
        (EPERM, Lockdown("integrity"), UNRESTRICTED, "the kernel's lockdown forbids reading counters in debugfs"),
        (EPERM, Lockdown("none"), UNRESTRICTED, "although there is no lockdown"),
        (EPERM, UNKNOWN, UNRESTRICTED, "with every capability: the kernel is locked down, in a mode not known"),
        (
            EPERM,
            UNKNOWN,
            replace(UNRESTRICTED, is_seccomp_filtered=True),
            "perhaps by lockdown, whose mode is not known",
        ),
        (EPERM, UNKNOWN, replace(UNRESTRICTED, capabilities=1 << 2), "perhaps by lockdown, whose mode is not known"),
        (EPERM, UNKNOWN, replace(UNRESTRICTED, capabilities=None), "perhaps by lockdown, whose mode is not known"),
    ],
)
def test_a_refusal_is_laid_to_lockdown_only_on_evidence(
    err: OSError, lockdown: Lockdown, privileges: Privileges, reason: str
) -> None:
    found = explain_refusal(err, lockdown, privileges)
    assert reason in found.reason
    # Under lockdown, there is nothing to be done.
    assert bool(found.remedy) == ("the kernel" not in found.reason)


@given(st.text())
def test_foreign_text_is_a_number_or_malformed(text: str) -> None:
    try:
        assert parse_counter(text, "here") >= 0
    except MalformedData as err:
        assert len(str(err)) < 400


@given(st.integers(0, 2**64 - 1))
def test_every_counter_is_read_exactly(number: int) -> None:
    assert parse_counter(f"{number}\n", "here") == number
