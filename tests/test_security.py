"""SECURITY.md: every bound has tests that exist, and every attack of tests/hostile has its bound."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from exporter.stalls.drill import DRILL_SECONDS
from exporter.web.connection_guard import FIRST_REQUEST_SECONDS
from exporter.web.protocol import MAX_HEAD_BYTES, MAX_WAITING_REQUESTS
from exporter.web.stall_handlers import PAUSE_SECONDS
from kvm.identity.libvirt_status import STATUS_BYTES
from kvm.identity.owner_cache import OwnerCache
from kvm.identity.vmm_cmdline import LABEL_BYTES
from kvm.vm_budget import PROCESS_VMS, UID_VMS
from tests.documents import ROOT, SECURITY

POSITIONS = ["Guest", "Tenant", "Local uid", "Network", "Administrator of another layer"]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def read_rows() -> dict[str, list[list[str]]]:
    """The rows of each position's table: what can be tried, at most, test."""
    sections = re.findall(r"^### (.+)\n((?:(?!^#).*\n)*)", SECURITY.read_text(), re.MULTILINE)
    return {
        name: [[cell.strip() for cell in row.strip("|").split(" | ")] for row in re.findall(r"^\| .*$", text, re.M)[1:]]
        for name, text in sections
    }


ROWS = [(position, row) for position, rows in read_rows().items() for row in rows]


def find_tests(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_position_is_there_and_can_try_something() -> None:
    rows = read_rows()
    assert list(rows) == POSITIONS
    assert all(rows.values())


@pytest.mark.parametrize(("position", "row"), ROWS, ids=[f"{position}: {row[0][:40]}" for position, row in ROWS])
def test_a_bound_is_shown_by_tests_that_exist(position: str, row: list[str]) -> None:
    what, bound, tests = row
    assert what
    assert bound
    assert _TEST.sub("", tests).strip() == ""
    named = _TEST.findall(tests)
    assert named, f"{position}: {what}: no test"
    for file, name in named:
        assert name.startswith("test_")
        assert name in find_tests(ROOT / file), f"{file} has no {name}"


def test_every_attack_stands_in_the_document() -> None:
    named = set(_TEST.findall(SECURITY.read_text()))
    attacks = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests/hostile").glob("test_*.py")
        for name in find_tests(path)
        if name.startswith("test_")
    }
    assert attacks
    assert attacks <= named


def test_the_numbers_are_those_of_the_code() -> None:
    bounds = " ".join(row[1] for _position, row in ROWS)
    assert f"{PROCESS_VMS} of a process and {UID_VMS} of a uid" in bounds
    assert f"{LABEL_BYTES} bytes of it" in bounds
    assert f"{STATUS_BYTES >> 10} KiB of it" in bounds
    assert f"{OwnerCache.CHILDREN_OF_A_UID} child processes of its uid" in bounds
    assert f"after {FIRST_REQUEST_SECONDS:g} s or {MAX_HEAD_BYTES >> 10} KiB" in bounds
    assert f"who has {MAX_WAITING_REQUESTS:,} waiting" in bounds
    assert DRILL_SECONDS + PAUSE_SECONDS == 300
    assert "one in five minutes" in bounds
