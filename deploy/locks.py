"""``python -m deploy.locks`` pins what the program runs with, and what builds it, with hashes; it asks the index.

``pip install --require-hashes --requirement deploy/locks/build.txt`` then takes these files and no others, whatever an
index says. A test, which needs no network, holds the locks to what ``pyproject.toml`` asks for.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "deploy/locks"
# Each lock with the extra of pyproject.toml that it has besides what the program needs.
EXTRAS = {"run.txt": "", "build.txt": "build"}
HEAD = """# Made by `python -m deploy.locks`: pip install --require-hashes --requirement deploy/locks/{name}
# For {digest} of pyproject.toml
"""


class Pinned(NamedTuple):
    """One distribution at its version; any file of one of these SHA-256 hashes will do."""

    name: str
    version: str
    hashes: frozenset[str]


def find_requirements(extra: str, root: Path = ROOT) -> list[str]:
    """Return what ``pyproject.toml`` asks for, in order of the alphabet."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return sorted([*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])])


def digest_requirements(extra: str, root: Path = ROOT) -> str:
    """Return what changes when one of the requirements does."""
    return hashlib.sha256("\n".join(find_requirements(extra, root)).encode()).hexdigest()[:16]


def parse_lock(text: str) -> list[Pinned]:
    """Parse a lock; raises ValueError on a line that pins nothing."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)((?:\s*--hash=sha256:[0-9a-f]{64})+)", line)
        if match is None:
            raise ValueError(f"no version with hashes: {line[:100]}")
        found.append(Pinned(match[1], match[2], frozenset(re.findall(r"[0-9a-f]{64}", match[3]))))
    return found


def compile_lock(extra: str, environment: Mapping[str, str]) -> str:
    """Ask the index for the newest versions; raises CalledProcessError."""
    words = [str(Path(sys.executable).with_name("pip-compile")), "--quiet", "--upgrade", "--strip-extras"]
    words += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header", "--output-file=-"]
    words += [f"--extra={extra}"] if extra else []
    done = subprocess.run(
        [*words, "pyproject.toml"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> int:
    """Write the locks anew; what pip is told on this machine beside the index is left out."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_CONSTRAINT")
    }
    for name, extra in EXTRAS.items():
        text = compile_lock(extra, environment | {"PIP_CONFIG_FILE": os.devnull})
        (LOCKS / name).write_text(HEAD.format(name=name, digest=digest_requirements(extra)) + text)
        print(LOCKS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
