"""Puts together what packages hold: what is in the repository, the program as built, manual page, completions."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.utils import formatdate
from pathlib import Path

from deploy.bill import render_bill
from deploy.locks import ROOT
from deploy.manual import SHELLS, render_completion, render_manual
from exporter.build_info import NAME

# What packages take from the repository as it is.
TAKEN = ("deploy", "grafana", "README.md", "LICENSE")


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this checkout; raises CalledProcessError."""
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = directory.glob("*.whl")
    return wheel


def read_wheel_version(wheel: Path) -> str:
    """Read the version of a wheel; raises ValueError where its name is not a wheel's."""
    match = re.fullmatch(r"kvm_notify_exporter-(\d+\.\d+\.\d+)-py3-none-any\.whl", wheel.name)
    if match is None:
        raise ValueError(f"{wheel.name}: the wheel of a release is wanted, for any system")
    return match[1]


def render_debian_changelog(version: str, seconds: int) -> str:
    """Render the changelog that a Debian package has to have: what changes in the program stands in its own."""
    date = formatdate(seconds)
    maintainer = "The kvm-notify-exporter authors <kvm-notify-exporter@localhost>"
    return f"{NAME} ({version}-1) unstable; urgency=medium\n\n  * Package {version}.\n\n -- {maintainer}  {date}\n"


def lay_stage(stage: Path, seconds: int) -> str:
    """Fill a directory with all that ``nfpm.yaml`` names, as of this time, and return the version.

    Packages take over the times and modes that files have: those of a checkout are whatever they are.
    """
    for name in TAKEN:
        source, target = ROOT / name, stage / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    generated = stage / "generated"
    generated.mkdir()
    with tempfile.TemporaryDirectory() as directory:
        wheel = build_wheel(Path(directory))
        version = read_wheel_version(wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(generated / "lib")
    manual = render_manual(version).encode()
    (generated / f"{NAME}.1.gz").write_bytes(gzip.compress(manual, mtime=0))
    changes = (ROOT / "CHANGELOG.md").read_bytes()
    (generated / "CHANGELOG.md.gz").write_bytes(gzip.compress(changes, mtime=0))
    entry = render_debian_changelog(version, seconds).encode()
    (generated / "changelog.Debian.gz").write_bytes(gzip.compress(entry, mtime=0))
    (generated / "sbom.cdx.json").write_text(render_bill(version, generated / "lib", seconds))
    for shell in SHELLS:
        (generated / f"completion.{shell}").write_text(render_completion(shell))
    for path in [stage, *stage.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (seconds, seconds))
    return version
