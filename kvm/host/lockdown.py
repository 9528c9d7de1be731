"""Reads the kernel's lockdown mode: the one place that does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvm.host.private_mount import PrivateMount


class Lockdown(NamedTuple):
    """The mode (``none``, ``integrity``, ``confidentiality``), "" where it is not known; ``note`` says how or why."""

    mode: str
    note: str = ""


def parse_lockdown(text: str) -> str:
    """Return the mode in brackets of /sys/kernel/security/lockdown, "" where there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def read_lockdown(sysfs: Path, open_private: Callable[[str], PrivateMount] = PrivateMount) -> Lockdown:
    """Read the mode from securityfs, or from a private instance where it is not mounted. Raises nothing."""
    securityfs = sysfs / "kernel/security"
    found = _read(securityfs)
    if found is not None:
        return found
    try:
        private = open_private("securityfs")
    except OSError as err:
        return Lockdown("", f"securityfs is not mounted, and this process may not open it ({err.strerror})")
    try:
        found = _read(private.path)
    finally:
        private.close()
    if found is None:
        return Lockdown("", "securityfs is empty")
    return found._replace(note=found.note or "securityfs is not mounted: read through a private instance")


def _read(securityfs: Path) -> Lockdown | None:
    """Read the mode; None where this is no securityfs."""
    try:
        return Lockdown(parse_lockdown((securityfs / "lockdown").read_text()))
    except FileNotFoundError:
        pass
    except OSError as err:
        return Lockdown("", f"{securityfs}/lockdown: {err.strerror}")
    try:
        is_securityfs = any(securityfs.iterdir())
    except OSError:
        return None
    return Lockdown("none", "the kernel is built without lockdown") if is_securityfs else None
