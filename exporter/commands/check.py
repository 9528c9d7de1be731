"""``check``: explain what works on this host, what does not, and why."""

from __future__ import annotations

import argparse
import contextlib
import sys

from exporter.host_summary import can_read, render_check
from exporter.wiring import ONE_LOOK_WAIT_SECONDS, PROC, SYSFS, open_host
from kvm.host import facts
from kvm.host.privileges import read_privileges


def run_check(arguments: argparse.Namespace) -> int:
    """Print what works on this host; 0 if counters can be read, else 1."""
    with contextlib.ExitStack() as stack:
        snapshot = open_host(arguments.sources, stack, ONE_LOOK_WAIT_SECONDS).read()
    cpuinfo = (PROC / "cpuinfo").read_text(errors="replace")
    sys.stdout.write(render_check(snapshot, read_privileges(PROC, SYSFS), facts.parse_vmx_flags(cpuinfo)))
    return 0 if can_read(snapshot) else 1
