"""Reads systemd's unit files: what is set, where, and what the comment above it says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "deploy/systemd"
UNITS = sorted(path.name for path in SYSTEMD.glob("*.service"))
SOCKET = "kvm-notify-exporter.socket"
FULL, NO_ADMIN = "kvm-notify-exporter.service", "kvm-notify-exporter-no-admin.service"


class Setting(NamedTuple):
    """One line of a unit; ``comment`` is the line above it where that is a comment, else ""."""

    section: str
    name: str
    value: str
    comment: str


def parse_unit(text: str) -> list[Setting]:
    """Parse a unit without continued lines; raises ValueError on a line that is none of systemd's."""
    found, section, above = list[Setting](), "", ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals or line.endswith("\\"):
                raise ValueError(f"no setting: {line!r}")
            found.append(Setting(section, name, value, above if above.startswith("#") else ""))
        above = line
    return found


def read_unit(name: str) -> list[Setting]:
    """Read one of our units."""
    return parse_unit((SYSTEMD / name).read_text())


def read_values(name: str, setting: str) -> list[str]:
    """Read the words of all lines of a setting, in order."""
    return [word for found in read_unit(name) if found.name == setting for word in found.value.split()]
