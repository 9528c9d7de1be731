"""What every test here needs: a /dev/kvm."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
