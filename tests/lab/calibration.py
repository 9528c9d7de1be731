"""How much slower Python is inside the lab: so that its CPU time there says something about real machines."""

from __future__ import annotations

import json
import statistics
import time
from typing import Final

# What the work takes on an idle core of a real machine (AMD EPYC 9004, Python 3.11): this is what "a core" means.
# Not measured anew each time: a machine that runs the lab is busy with it.
CORE_SECONDS: Final = 0.013
# What `find_slowdown` finds while a machine with two free CPUs runs the lab: 16 to 18 in several runs.
USUAL_SLOWDOWN: Final = 17.0
TRIALS: Final = 5
_DOCUMENT: Final = {f"kvm_vcpu_{number}": [number, str(number), number / 7] for number in range(200)}


def is_within(seconds: float, limit_seconds: float) -> bool:
    """Tells whether a delay keeps to a limit; on a machine that is slower than usual now, to one longer by as much."""
    return seconds < limit_seconds or seconds < limit_seconds * max(1.0, find_slowdown() / USUAL_SLOWDOWN)


def find_slowdown() -> float:
    """Returns how many times as long Python takes here as on an idle core of a real machine."""
    return statistics.median(_work() for _ in range(TRIALS)) / CORE_SECONDS


def _work() -> float:
    """Returns the CPU seconds of a fixed piece of work, of the kind an agent does."""
    began = time.process_time()
    for _ in range(40):
        document = json.loads(json.dumps(_DOCUMENT))
        sum(len(name) * values[0] for name, values in sorted(document.items()))
        " ".join(f"{name}={values[2]:.3f}" for name, values in document.items()).split()
    return time.process_time() - began
