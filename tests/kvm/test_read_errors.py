"""What is counted each time, and logged once."""

from __future__ import annotations

import logging

import pytest

from kvm.log_limit import WINDOW_SECONDS
from kvm.model import Owner, Vm, VmKey
from kvm.read_errors import LINES, ReadErrors


def make_vm(pid: int, fd: int = 4) -> Vm:
    return Vm(f"id-{pid}-{fd}", VmKey(pid, 5, fd), Owner("qemu"), None)


def test_what_is_left_out_again_is_counted_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    errors = ReadErrors()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            errors.record("stats_fd", 7, "malformed", "nonsense")
            errors.log_new([make_vm(7)])
    assert errors.counts == {("stats_fd", "malformed"): 5}
    assert len(caplog.records) == 1


def test_no_vm_is_named_for_the_trouble_of_another_one_of_its_process(caplog: pytest.LogCaptureFixture) -> None:
    errors = ReadErrors()
    with caplog.at_level(logging.WARNING):
        for pid in (7, 8):
            errors.record("owners", pid, "duplicate", "it is another one")
        errors.record("none", make_vm(8, 5).key, "unread", "nothing reads it")
        errors.record("none", make_vm(8, 4).key, "unread", "nor this, which its process takes no second line for")
        errors.record("bpf", make_vm(8, 6).key, "malformed", "it has ended")
        errors.log_new([make_vm(7), make_vm(8, 4), make_vm(8, 5)])
    fields = [vars(record)["fields"] for record in caplog.records]
    assert [(told["pid"], told.get("vm"), told.get("name")) for told in fields] == [
        (7, make_vm(7).id, make_vm(7).owner.name),
        (8, None, None),
        (8, make_vm(8, 5).id, make_vm(8, 5).owner.name),
        (8, None, None),
    ]


def test_a_process_with_many_vms_does_not_use_up_what_may_be_said_of_others(caplog: pytest.LogCaptureFixture) -> None:
    errors, crowd, victim = ReadErrors(), [make_vm(6, fd) for fd in range(64)], make_vm(9)
    with caplog.at_level(logging.WARNING):
        for vm in (*crowd, victim):
            errors.record("none", vm.key, "unread", "nothing reads it")
        errors.log_new([*crowd, victim])
    assert [vars(record)["fields"]["vm"] for record in caplog.records] == [crowd[0].id, victim.id]


def test_troubles_by_the_thousand_are_a_few_lines_and_their_number(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    errors = ReadErrors(lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for pid in range(1, 1001):
            errors.record("owners", pid, "hung", "it hangs")
            errors.log_new([make_vm(pid)])
        errors.record("bpf", 7, "malformed", "nonsense")
        errors.log_new([])
        assert len(caplog.records) == LINES + 1
        now[0] += WINDOW_SECONDS
        errors.record("owners", 2000, "hung", "it hangs")
        errors.log_new([])
    assert len(caplog.records) == LINES + 2
    assert vars(caplog.records[-1])["fields"]["withheld"] == 1000 - LINES
    assert errors.counts == {("owners", "hung"): 1001, ("bpf", "malformed"): 1}
