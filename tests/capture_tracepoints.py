"""Captures the format of kvm:kvm_exit from this kernel and from those of the lab.

``python -m tests.capture_tracepoints`` writes below tests/fixtures/tracepoints/, the kernel's identity beside each
capture. Each of the lab's kernels is booted for it.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

from tests.lab.boot import run_in_kernel
from tests.lab.debian import SERIES, open_kernel

FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_exit/format")
FIXTURES = Path(__file__).parent / "fixtures" / "tracepoints"


def write_capture(release: str, text: bytes) -> None:
    name = f"linux-{'.'.join(release.split('.')[:2])}"
    (FIXTURES / f"{name}.format").write_bytes(text)
    (FIXTURES / f"{name}.json").write_text(json.dumps({"kernel": release, "path": str(FORMAT)}, indent=2) + "\n")


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    write_capture(platform.release().split("-")[0], FORMAT.read_bytes())
    for series in SERIES:
        run = run_in_kernel(open_kernel(series), ["true"], files=[str(FORMAT)])
        write_capture(run.release, run.files[str(FORMAT)])
