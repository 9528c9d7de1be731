"""kubectl as Debian 13 has it: Debian 12's is of 2021 and does not understand the kustomizations."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab.apt import open_tree
from tests.lab.debian import TRIXIE


def open_kubectl() -> Path:
    """Return where kubectl is, fetched and unpacked in the lab's cache if need be; raises LabError."""
    tree = open_tree("kubectl", ["kubectl"], lambda: TRIXIE.fetch_alone(["kubectl"]))
    return tree.path / "usr/bin/kubectl"


def render(directory: Path) -> str:
    """Render a kustomization, as `kubectl apply --kustomize` does; raises AssertionError with what kubectl says."""
    words = [str(open_kubectl()), "kustomize", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
