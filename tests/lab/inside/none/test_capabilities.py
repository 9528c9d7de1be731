"""The row of the table of capabilities that takes a kernel of its own: perf_event_paranoid is the whole machine's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import GuestProcess
from tests.live.feature_rows import check_row, copy_packages, find_features

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy_packages(Path(directory))
        yield Path(directory)


@pytest.fixture
def paranoid(request: pytest.FixtureRequest) -> Iterator[str]:
    """perf_event_paranoid has the value of the test's parameter."""
    before = PARANOID.read_text()
    PARANOID.write_text(request.param)
    yield request.param
    PARANOID.write_text(before)


@pytest.mark.parametrize("paranoid", ["2", "3"], indirect=True)
def test_the_row_of_rips_is_as_paranoid_as_the_kernel(paranoid: str, packages: Path, guest: GuestProcess) -> None:
    feature = find_features()["RIPs"]
    assert ("CAP_SYS_ADMIN" in feature.needs) is (paranoid == "3")
    check_row(feature, packages, guest.pid)
