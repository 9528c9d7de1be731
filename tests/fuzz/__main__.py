"""``python -m tests.fuzz --seconds=60``: fuzz every target for so long, guided by what of the code is reached.

What is found stays in ``.cache/fuzz``; the corpus in ``tests/fuzz/corpus`` is what to begin with, and what every test
run replays. A crash is kept there as ``TARGET/crash-...``: mend it, and commit the file. Ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
FOUND = ROOT / ".cache" / "fuzz"
LARGEST_INPUT = 4096


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; False if it has a fault."""
    found, kept = FOUND / name, CORPUS / name
    found.mkdir(parents=True, exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST_INPUT}", "-timeout=10", "-rss_limit_mb=2048"]
    words = [sys.executable, "-m", "tests.fuzz.one", name, *limits, "-verbosity=0", "-print_final_stats=1"]
    run = subprocess.run(
        [*words, f"-artifact_prefix={kept}/", str(found), str(kept)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    executed = [line.split()[-1] for line in run.stderr.splitlines() if "number_of_executed_units" in line]
    print(f"{name:20} {'FAULT' if run.returncode else 'holds':6} inputs tried: {' '.join(executed) or '?'}", flush=True)
    if run.returncode:
        print(run.stderr[-4000:])
    return run.returncode == 0


def main() -> int:
    """Fuzz each; 1 if one has a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("targets", nargs="*", default=[*TARGETS], help="which (default: all)")
    arguments = parser.parse_args()
    held = [fuzz(name, arguments.seconds) for name in arguments.targets]
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
