"""``python -m tests.hostile``: all attacks at once for an hour, and a table of what came of it.

Ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import os

from tests import own_mounts
from tests.hostile.siege import BIRTHS_A_SECOND, Sample, run_siege
from tests.hostile.siege_report import SAMPLES_HEADER, judge, render_log, render_sample, render_table


def tell(sample: Sample) -> None:
    print(render_sample(sample), flush=True)


def main() -> int:
    """Run it; 1 where a bound is broken, 2 where it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long it takes (default: 60)")
    parser.add_argument(
        "--births",
        type=int,
        default=BIRTHS_A_SECOND,
        help="VMs a second that are made and ended (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("needs root and /dev/kvm")
        return 2
    own_mounts.enter()
    print(SAMPLES_HEADER, flush=True)
    seen = run_siege(arguments.minutes * 60, max(12, round(arguments.minutes)), tell, arguments.births)
    rows = judge(seen)
    print(f"\n{render_table(rows)}\n\nwhat the agent has logged:\n{render_log(seen.log)}")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
