"""What tests do with an agent that the package has installed."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.chroot import Container
from tests.waiting import wait_until


def install(container: Container, package: Path) -> None:
    container.run("dpkg", "--install", f"/opt/{package.name}")


def find_main_pid(container: Container, unit: str) -> str:
    """The agent's pid, "" where none runs."""
    return container.show(unit, "MainPID").removeprefix("0")


def wait_for_agent(container: Container, unit: str) -> None:
    def has_seen() -> bool:
        return find_main_pid(container, unit) != "" and "kvm_exporter_snapshot" in container.get("/metrics")[1]

    wait_until(has_seen, lambda: read_journal(container, unit), seconds=60, pause_seconds=0.5)


def read_journal(container: Container, unit: str) -> str:
    return container.run("journalctl", "--no-pager", f"--unit={unit}")


def find_new_pid(container: Container, unit: str, before: str) -> str:
    """Wait for another agent than the one before; returns its pid."""

    def find() -> str:
        pid = find_main_pid(container, unit)
        return pid if pid != before and container.show(unit, "ActiveState") == "active" else ""

    wait_until(find, lambda: read_journal(container, unit), seconds=60, pause_seconds=0.2)
    return find()
