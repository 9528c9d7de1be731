"""What the tests of the patched KVM have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import GuestProcess, open_guest_process


@pytest.fixture
def fresh() -> Iterator[GuestProcess]:
    """A guest without a past: where its last notify exit was decides what the next one counts as."""
    with open_guest_process(vcpus=2, stats_fds=True) as guest:
        yield guest
