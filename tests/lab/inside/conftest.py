"""What the tests inside the lab have in common."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.live import GuestProcess, open_guest_process

if TYPE_CHECKING:
    from tests.blind.scene import Scene

LOCKDOWN = Path("/sys/kernel/security/lockdown")
UUID = "0d1f7fd4-6c1c-4c5c-8f6f-3c1c5a0e7b11"


@pytest.fixture(scope="module")
def injector() -> Iterator[None]:
    """The injector is loaded.

    Anew for each module: its probes do not come back by themselves when a test unloads KVM and loads it again.
    """
    subprocess.run(["insmod", "/lab/modules/notify_inject.ko"], check=True)
    yield
    subprocess.run(["rmmod", "notify_inject"], check=True)


@pytest.fixture(scope="module")
def shared_guest() -> Iterator[GuestProcess]:
    """The guest of a module: a process takes a second and a half to start under emulation."""
    with open_guest_process(vcpus=2, name="lab", uuid=UUID, stats_fds=True) as running:
        yield running


@pytest.fixture
def guest(shared_guest: GuestProcess) -> Iterator[GuestProcess]:
    """A guest with two vCPUs in a process that looks like QEMU and holds stats fds; idle at first.

    It has a past: tests compare counts before and after, as anyone has to who looks at a running VM.
    """
    yield shared_guest
    if shared_guest.process.poll() is None:
        shared_guest.reset()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Two VMs for agents that are blind, and where those are run."""
    from tests.blind.scene import open_scene  # noqa: PLC0415 - only some boots need it, and imports take seconds here

    with open_scene() as opened:
        yield opened


def pytest_report_header() -> str:
    """Says in which state of lockdown this kernel is: the report leaves the lab."""
    return f"lab: lockdown {LOCKDOWN.read_text(encoding='ascii').strip()}"
