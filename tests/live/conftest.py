"""What tests of several files here share."""

from __future__ import annotations

import pytest

from tests.live.expressions import find_choices, find_questions
from tests.live.monitored_hosts import Episode, record_episode


@pytest.fixture(scope="session")
def episode() -> Episode:
    """One stall of the demo from its beginning to its end, as a monitoring system has seen it; takes 90 seconds."""
    return record_episode(find_questions(), find_choices())
