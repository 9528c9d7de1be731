"""The kernel's lockdown mode."""

from __future__ import annotations

import re
from pathlib import Path


def parse_lockdown(text: str) -> str:
    """Return the mode in brackets of /sys/kernel/security/lockdown, "" where there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def read_lockdown(sysfs: Path) -> str:
    """Read the kernel's lockdown mode; "" where securityfs is not mounted or the kernel has no lockdown."""
    try:
        return parse_lockdown((sysfs / "kernel/security/lockdown").read_text())
    except OSError:
        return ""
