"""What is counted each time, what once, and what is logged."""

from __future__ import annotations

import logging

import pytest

from kvm.model import Owner, Vm, VmKey
from kvm.read_errors import ReadErrors


def make_vm(pid: int, fd: int = 4) -> Vm:
    return Vm(f"id-{pid}-{fd}", VmKey(pid, 5, fd), Owner("qemu"), None)


def test_a_conflict_that_stands_is_one_however_many_vms_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    errors = ReadErrors()
    for number in range(1000):
        errors.record("owners", 7, "duplicate", "another VM has its identity")
        errors.log_new([make_vm(7, number)])
    assert errors.counts == {("owners", "duplicate"): 1}
    errors.record("owners", 8, "duplicate", "another VM has its identity")
    errors.log_new([make_vm(7), make_vm(8)])
    assert errors.counts == {("owners", "duplicate"): 2}
    assert len(caplog.records) == 2


def test_a_conflict_of_a_process_that_comes_after_is_a_new_one() -> None:
    errors = ReadErrors()
    for _ in range(3):
        errors.record("owners", 7, "duplicate", "")
        errors.log_new([make_vm(7)])
        errors.log_new([])
    assert errors.counts == {("owners", "duplicate"): 3}


def test_what_is_left_out_again_is_counted_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    errors = ReadErrors()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            errors.record("stats_fd", 7, "malformed", "nonsense")
            errors.log_new([make_vm(7)])
    assert errors.counts == {("stats_fd", "malformed"): 5}
    assert len(caplog.records) == 1
