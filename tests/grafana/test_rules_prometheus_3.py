"""The rules mean the same to Prometheus 3, whose ranges leave out their older end: promtool of Debian's next release.

`tests/grafana/test_rules.py` asks the promtool that is installed. This one is fetched and unpacked as the lab's kernels
are, and is never installed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.grafana.test_rules import RULE_FILES, TEST_FILES, by_name
from tests.lab.apt import Archive, LabError, open_tree

PACKAGE = "promtool"
NEXT_RELEASE = Archive("forky", is_released=False)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def promtool() -> Path:
    wanted = [NEXT_RELEASE.codename, PACKAGE]
    try:
        tree = open_tree(PACKAGE, wanted, lambda: NEXT_RELEASE.fetch_alone([PACKAGE]))
    except LabError as err:
        pytest.skip(f"Debian's archive cannot be asked: {err}")
    return tree.path / "usr/bin" / PACKAGE


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_it_is_prometheus_3(promtool: Path) -> None:
    assert run(promtool, "--version").stdout.startswith("promtool, version 3.")


@pytest.mark.parametrize("file", RULE_FILES, ids=by_name)
def test_promtool_3_accepts_the_rules(promtool: Path, file: Path) -> None:
    done = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", TEST_FILES, ids=by_name)
def test_unit_tests_of_rules_pass_with_promtool_3(promtool: Path, file: Path) -> None:
    done = run(promtool, "test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
