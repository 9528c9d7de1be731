"""``python -m deploy --outdir=dist`` makes a .deb, an .rpm and their bill of materials.

The same commit gives the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.locks import ROOT
from deploy.stage import lay_stage

FORMATS = ("deb", "rpm")


def read_commit_time() -> str:
    """Return when the commit was made that is checked out, in seconds since 1970; "0" outside of git."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "0"


def make_packages(outdir: Path) -> list[Path]:
    """Make a package of each format, and the bill of materials; raises CalledProcessError."""
    outdir.mkdir(parents=True, exist_ok=True)
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or read_commit_time()
    os.environ["SOURCE_DATE_EPOCH"] = seconds  # also what hatchling and argparse-manpage go by
    nfpm, made = Path(sys.executable).with_name("nfpm"), []
    with tempfile.TemporaryDirectory() as stage:
        version = lay_stage(Path(stage), int(seconds))
        for form in FORMATS:
            target = outdir / f"kvm-notify-exporter_{version}_amd64.{form}"
            words = [str(nfpm), "package", "--config=deploy/nfpm.yaml", f"--packager={form}", f"--target={target}"]
            environment = {**os.environ, "VERSION": version}
            subprocess.run(words, cwd=stage, env=environment, check=True, stdout=subprocess.DEVNULL)
            made.append(target)
        bill = outdir / f"kvm-notify-exporter_{version}.cdx.json"
        shutil.copyfile(Path(stage) / "generated/sbom.cdx.json", bill)
        made.append(bill)
    return made


def main() -> int:
    """Make the packages and print where they are."""
    parser = argparse.ArgumentParser(prog="python -m deploy", description=__doc__)
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    for path in make_packages(parser.parse_args().outdir.absolute()):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
