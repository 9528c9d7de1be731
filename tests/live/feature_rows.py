"""Runs ``feature_probe`` as a user of no rights, with the capabilities of a row of the table and no others."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvm.host.privileges import IMPLIED_BY, Feature, Privileges, read_privileges
from tests.live import feature_probe

ROOT: Final = Path(__file__).parents[2]
PROBE: Final = Path(feature_probe.__file__)
WITH_CAPABILITIES: Final = ROOT / "tests/with_capabilities.py"
# Debian's, which everybody may run: the one of a virtual environment may lie in somebody's home.
PYTHON: Final = "/usr/bin/python3"
NOBODY: Final = 65534


def find_features(privileges: Privileges | None = None) -> dict[str, Feature]:
    """What each feature takes here, for nobody."""
    found = replace(privileges or read_privileges(), uid=NOBODY).find_features()
    return {feature.name: feature for feature in found}


def copy_packages(directory: Path) -> None:
    """Put the probe, and the package that it takes, where everybody may read them."""
    directory.chmod(0o755)
    shutil.copytree(ROOT / "kvm", directory / "kvm", ignore=shutil.ignore_patterns("__pycache__", "patches"))
    shutil.copy(PROBE, directory)
    subprocess.run(["chmod", "-R", "a+rX", str(directory)], check=True)


def try_feature(name: str, held: Sequence[str], packages: Path, pid: int, prefix: Sequence[str] = ()) -> str:
    """What the probe says as nobody, with these capabilities and no others; ``prefix`` is a command that runs it."""
    drop = [PYTHON, "-I", str(WITH_CAPABILITIES), str(NOBODY), ",".join(held)]
    probe = [PYTHON, "-I", str(packages / PROBE.name), str(packages), name, str(pid)]
    done = subprocess.run([*prefix, *drop, *probe], cwd="/", capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_row(feature: Feature, packages: Path, pid: int, prefix: Sequence[str] = ()) -> None:
    """Show that a feature works with its row, and without any one capability of it does not.

    But for those that another one of the row has in it: for a person, the row names them too.
    """
    said = try_feature(feature.name, feature.needs, packages, pid, prefix)
    assert said == "works", said
    for missing in (name for name in feature.needs if IMPLIED_BY.get(name) not in feature.needs):
        held = [capability for capability in feature.needs if capability != missing]
        said = try_feature(feature.name, held, packages, pid, prefix)
        assert said not in ("works", ""), f"{feature.name} does without {missing}"
