"""Debians that have booted with nothing but the .deb installed: an agent that is not root reads, traces and outlives.

`tests/lab/inside/installed` runs there, on what the package has installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.blind.table import count_wrong, render_table
from tests.deploy.chroot import has_all_that_it_takes
from tests.deploy.virtual_machine import run_in_machine
from tests.lab.boot import ThreadIndex
from tests.lab.inside.installed.test_blind_units import WAYS as UNIT_WAYS
from tests.lab.plan import JUNIT, PYTEST, find_kernel_warnings, parse_blind_rows, parse_figures, parse_junit

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
    pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="mkfs.ext4 is not installed"),
]


def run_tests(tree: Path, threads: ThreadIndex, tell: Callable[[str], None], *words: str) -> int:
    """Boot it and run tests there, of which none may fail or be skipped; returns how many."""
    run = run_in_machine(tree, [*PYTEST, *words], [JUNIT], threads)
    assert JUNIT in run.files, run.output[-4000:] + run.console[-4000:]
    tests, failed, skipped = parse_junit(run.files[JUNIT])
    rows = parse_blind_rows(run.files[JUNIT])
    for line in (*parse_figures(run.files[JUNIT]), *(render_table(rows) if rows else ())):
        tell(f"{tree.name}: {line}")
    tell(f"{tree.name}: up after {run.boot_seconds:.0f} s, {tests} tests in {run.seconds:.0f} s, {failed} failed")
    assert (run.exit_status, failed, skipped) == (0, 0, 0), run.output[-12000:]
    assert count_wrong(rows) == 0
    assert find_kernel_warnings(run.console) == ()
    return tests


def test_the_agent_reads_traces_and_outlives(tested_tree: Path, tell: Callable[[str], None]) -> None:
    # Guests that flood need CPUs that take turns.
    assert run_tests(tested_tree, ThreadIndex.SINGLE, tell, "tests/lab/inside/installed/test_installed.py") == 6


def test_no_surface_claims_more_than_root_can_confirm(tested_tree: Path, tell: Callable[[str], None]) -> None:
    tests = ("tests/lab/inside/installed/test_blind_units.py", "tests/lab/inside/blind/test_blind.py")
    assert run_tests(tested_tree, ThreadIndex.MULTI, tell, *tests) == len(UNIT_WAYS) + 2
