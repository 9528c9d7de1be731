"""A skip fails where KVM_TESTS_MUST_RUN=1: shown by running pytest on a test that skips."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("must_run", "exit_code"), [("", 0), ("1", 1)])
def test_a_skip_is_a_failure_only_where_tests_must_run(tmp_path: Path, must_run: str, exit_code: int) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_skips.py").write_text("import pytest\ndef test_it(): pytest.skip('the moon is missing')\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(tmp_path)],
        env={**os.environ, "KVM_TESTS_MUST_RUN": must_run},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == exit_code, run.stdout
    assert "the moon is missing" in run.stdout
