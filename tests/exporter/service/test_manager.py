from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from exporter.service.manager import MAX_STATUS, ServiceManager, open_service_manager
from tests.exporter.service.listening_manager import open_manager

PID = 4242


@pytest.mark.parametrize("address", ["", f"@kvm-notify-test-{os.getpid()}"], ids=["path", "abstract"])
def test_assignments_go_to_a_path_or_an_abstract_address(address: str) -> None:
    with open_manager(address) as listening, ServiceManager(listening.address) as manager:
        manager.tell(READY=1, STATUS="26 VMs, 1 stalled")
        assert listening.take() == {"READY": "1", "STATUS": "26 VMs, 1 stalled"}


def test_no_text_can_forge_an_assignment_or_be_endless() -> None:
    with open_manager() as listening, ServiceManager(listening.address) as manager:
        manager.tell(STATUS="blind\nMAINPID=1\r\0\u2028\udcff" + "x" * 10_000)
        (text,) = listening.take().values()
        assert text.startswith("blind\ufffdMAINPID=1\ufffd\ufffd\ufffd")
        assert len(text) == MAX_STATUS


def test_reloading_has_the_time_that_systemd_compares_with_its_own() -> None:
    before = time.monotonic_ns() // 1000
    with open_manager() as listening, ServiceManager(listening.address) as manager:
        manager.tell_reloading()
        told = listening.take()
    assert told["RELOADING"] == "1"
    assert before <= int(told["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_the_variables_are_taken_away_from_children() -> None:
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(PID), "HOME": "/"}
    with open_service_manager(environment, PID) as manager:
        assert (manager.listens, manager.watchdog_seconds) == (True, 60.0)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    "environment",
    [
        {"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"},  # another process is to give signs
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_USEC": "\u0663"},
        {},
    ],
)
def test_no_watchdog_without_a_number_for_this_process(environment: dict[str, str]) -> None:
    with open_service_manager(environment | {"NOTIFY_SOCKET": "@x"}, PID) as manager:
        assert manager.watchdog_seconds is None


def test_without_a_service_manager_nothing_is_sent() -> None:
    with open_service_manager({}, PID) as manager:
        manager.tell(READY=1)
        assert (manager.listens, manager.watchdog_seconds) == (False, None)


def test_an_address_of_another_kind_is_told_of_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with open_service_manager({"NOTIFY_SOCKET": "vsock:2:1234"}, PID) as manager:
        assert not manager.listens
    assert "vsock:2:1234 is no path" in str(caplog.records[0].__dict__["fields"])


def test_a_manager_that_is_gone_costs_a_line_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with ServiceManager(str(tmp_path / "nobody")) as manager:
        for _ in range(20):
            manager.tell(WATCHDOG=1)
    assert {record.message for record in caplog.records} == {"the service manager is not told"}
    assert len(caplog.records) == 5


def test_a_manager_that_does_not_read_blocks_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with open_manager() as listening, ServiceManager(listening.address) as manager:
        for _ in range(5000):  # net.unix.max_dgram_qlen is far below
            manager.tell(WATCHDOG=1)
    assert {record.message for record in caplog.records} == {"the service manager is not told"}
