"""Which build of the agent this is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What runs: the agent's version and revision, and Python's version; "" where it is not known."""

    version: str
    revision: str
    python_version: str


NAME = "kvm-notify-exporter"


def read_version() -> str:
    """Return the version that is installed, "" where the package is not."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return ""
