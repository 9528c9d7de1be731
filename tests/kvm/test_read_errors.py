"""What is counted each time, and logged once."""

from __future__ import annotations

import logging

import pytest

from kvm.model import Owner, Vm, VmKey
from kvm.read_errors import ReadErrors


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
