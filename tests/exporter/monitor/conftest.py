"""What all tests of the stall monitor need."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
