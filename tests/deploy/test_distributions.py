"""Wheel and sdist hold the program and nothing else, and work with the libraries of Debian 12 and 13."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.distributions import CONSTRAINTS, ROOT, build_distributions, make_environment

RELEASES = ("debian-12.txt", "debian-13.txt")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_distributions(tmp_path_factory.mktemp("dist"))


def find_sources() -> set[str]:
    """The files of the two packages."""
    found = {path for package in ("kvm", "exporter") for path in (ROOT / package).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_is_the_program(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert names == {name for name in find_sources() if not name.startswith("kvm/patches/")}
    needs = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert needs == [
        "aiohttp<4,>=3.8.4",
        "bcrypt<6,>=3.2.2",
        "google-re2>=1.1.20240702",
        "prometheus-client<1,>=0.16",
        "psutil>=5.9",
        "pyyaml<7,>=6",
    ]


def test_the_sdist_is_the_program_and_what_builds_it(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    others = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert names == find_sources() | others


def read_pins(release: str) -> dict[str, str]:
    lines = (CONSTRAINTS / release).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_bounds_are_debians_oldest() -> None:
    declared = re.findall(r'^    "([a-z-]+)>=([0-9.]+),<\d+",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    oldest = read_pins(RELEASES[0])
    assert {name: oldest[name] for name, _version in declared} == {
        name: version if version.count(".") == 2 else f"{version}.0" for name, version in declared
    }


@pytest.mark.deploy
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_with_debians_libraries(
    release: str, distributions: tuple[Path, Path], tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """The wheel runs, and the unit tests of all that knows these libraries pass."""
    tools = ("capstone", "hypothesis", "promql-parser", "psutil", "pytest", "pytest-xdist", "PyYAML")
    python = make_environment(tmp_path / "venv", str(distributions[0]), *tools, constraints=release)
    show = "from importlib.metadata import version; import sys; print(*map(version, sys.argv[1:]), sep='\\n')"
    pins = read_pins(release)
    found = subprocess.run([str(python), "-c", show, *pins], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(pins, found, strict=True)) == pins

    program = [str(python.parent / "kvm-notify-exporter"), "once", "--help"]
    assert "--format" in subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    # What is skipped is named: tests that compare with what these libraries do not know yet.
    environment = {name: value for name, value in os.environ.items() if name != "KVM_TESTS_MUST_RUN"}
    words = [str(python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow", "tests/exporter"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    tell(f"unit tests with {release}: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert {line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SKIPPED")} <= {
        "this prometheus_client knows no text format 1.0.0"
    }
