"""`tests/blind` of the agent that the package has installed, with its Debian's Python and libraries.

On this machine's kernel, where its VMs are: what else Debian has, `test_machine.py` shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.blind.ways import WAYS
from tests.deploy.chroot import has_all_that_it_takes, run_on_host
from tests.deploy.installed import ENVIRONMENT, PROJECT
from tests.lab.plan import JUNIT, PYTEST, parse_figures, parse_junit

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
]
TESTS = "tests/blind/test_false_all_clears.py"


def test_no_surface_claims_more_than_root_can_confirm(tested_tree: Path, tell: Callable[[str], None]) -> None:
    said = run_on_host(tested_tree, "env", f"--chdir={PROJECT}", *ENVIRONMENT, *PYTEST, TESTS, expect=(0, 1))
    report = (tested_tree / JUNIT.lstrip("/")).read_bytes()
    tests, failed, skipped = parse_junit(report)
    for line in parse_figures(report):
        tell(f"{tested_tree.name}: {line}")
    assert (failed, skipped) == (0, 0), said[-12000:]
    assert tests > len(WAYS)
