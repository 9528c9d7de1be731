"""Builds wheel and sdist of this checkout, as `make dist` does, and environments to install them into."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).parent


def build_distributions(target: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; returns wheel and sdist."""
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def make_environment(directory: Path, *packages: str, constraints: str = "") -> Path:
    """Make a virtual environment with these packages, at the versions of a file of constraints; returns its Python."""
    venv.create(directory, with_pip=True)
    python = directory / "bin/python"
    pinned = ["--constraint", str(CONSTRAINTS / constraints)] if constraints else []
    words = [str(python), "-m", "pip", "install", "--quiet", *pinned, *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python
