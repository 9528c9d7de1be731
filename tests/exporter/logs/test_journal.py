"""What is sent to the journal, by a socket of our own."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.logs.journal import JournalHandler, encode_fields, is_journal, name_fields, use_journal
from exporter.stalls.stall_log import STALL_ID, StallLog
from tests.reports import make_report, make_vm


def decode(datagram: bytes) -> dict[str, str]:
    """Read a datagram as journald does."""
    fields = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
            datagram = rest
        else:
            (length,) = struct.unpack_from("<Q", rest)
            value, datagram = rest[8 : 8 + length], rest[8 + length + 1 :]
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.settimeout(10)
        yield listener


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    for handler in logger.handlers:
        if isinstance(handler, JournalHandler):
            handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_values_with_line_breaks_carry_their_length() -> None:
    assert encode_fields({"a_b": "x=y", "KVM_NAME": "one\ntwo"}) == (
        b"A_B=x=y\n" + b"KVM_NAME\n" + struct.pack("<Q", 7) + b"one\ntwo\n"
    )
    assert encode_fields({"_9-a\u00e9b": "v"}) == b"A_B=v\n"
    assert encode_fields({"a": "\udc80"}) == b"A=?\n"


def test_stderr_is_the_journal_if_systemd_says_so(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        found = os.fstat(file.fileno())
        assert is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, file.fileno())
        assert not is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, file.fileno())
        assert not is_journal({}, file.fileno())
    assert not is_journal({"JOURNAL_STREAM": "1:2"}, 10**6)


def test_a_stall_arrives_with_its_fields(journal: socket.socket, tmp_path: Path, root: logging.Logger) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        found = os.fstat(stderr.fileno())
        environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        root.handlers[:] = [logging.StreamHandler(stderr)]
        assert use_journal(environment, stderr.fileno(), tmp_path / "socket")
        StallLog().tell(make_report(vm=make_vm(name="a\nPRIORITY=0")), 100.0, 1.8e9)
    fields = decode(journal.recv(65536))
    assert fields["PRIORITY"] == "4"
    assert fields["MESSAGE_ID"] == STALL_ID
    assert fields["KVM_NAME"] == "a\nPRIORITY=0"
    assert (fields["KVM_VM"], fields["KVM_RIP"], fields["KVM_TID"]) == ("uuid-4242", "0xffffffff81012345", "5000")
    assert fields["MESSAGE"].startswith("vCPU makes no forward progress vm=uuid-4242 name=")
    assert (tmp_path / "stderr").read_text() == ""


def test_a_journal_that_does_not_take_it_leaves_it_to_stderr(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        handler = JournalHandler(logging.StreamHandler(stderr), tmp_path / "nobody")
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "words", None, None))
        handler.close()
    assert (tmp_path / "stderr").read_text() == "words\n"


def test_priorities_are_those_of_syslog() -> None:
    levels = {logging.CRITICAL: "3", logging.ERROR: "3", logging.WARNING: "4", logging.INFO: "6", logging.DEBUG: "7"}
    for level, priority in levels.items():
        assert name_fields(logging.LogRecord("x", level, "", 0, "m", None, None))["PRIORITY"] == priority


def test_without_a_journal_nothing_changes(tmp_path: Path, root: logging.Logger) -> None:
    before = list(root.handlers)
    assert not use_journal({}, 2, tmp_path / "socket")
    assert root.handlers == before
