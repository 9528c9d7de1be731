"""Reads the kernel's lockdown mode: the one place that does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvm.host.private_mount import PrivateMount
from kvm.host.securityfs import Securityfs, open_securityfs


class Lockdown(NamedTuple):
    """The mode (``none``, ``integrity``, ``confidentiality``), "" where it is not known; ``note`` says how or why."""

    mode: str
    note: str = ""


def parse_lockdown(text: str) -> str:
    """Return the mode in brackets of /sys/kernel/security/lockdown, "" where there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def read_lockdown(sysfs: Path, open_private: Callable[[str], PrivateMount] = PrivateMount) -> Lockdown:
    """Read the mode from securityfs, mounted or private. Raises nothing."""
    try:
        with open_securityfs(sysfs, open_private) as securityfs:
            return _read(securityfs)
    except OSError as err:
        return Lockdown("", f"securityfs is not mounted, and this process may not open it ({err.strerror})")


def _read(securityfs: Securityfs) -> Lockdown:
    note = "securityfs is not mounted: read through a private instance" if securityfs.is_private else ""
    try:
        return Lockdown(parse_lockdown((securityfs.path / "lockdown").read_text()), note)
    except FileNotFoundError:
        return Lockdown("none", "; ".join(filter(None, ("the kernel is built without lockdown", note))))
    except OSError as err:
        return Lockdown("", f"{securityfs.path}/lockdown: {err.strerror}")
