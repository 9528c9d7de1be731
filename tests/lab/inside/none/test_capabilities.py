"""The rows of the table of capabilities that take another kernel than the machine's that runs the other tests.

KVM is a module here, debugfs is open, and perf_event_paranoid can be 3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import GuestProcess
from tests.live.feature_rows import check_row, copy_packages, find_features, try_feature

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


@pytest.mark.parametrize("name", ["trigger", "source debugfs"])
def test_a_row_is_enough_and_nothing_in_it_is_too_much(name: str, packages: Path, guest: GuestProcess) -> None:
    feature = find_features()[name]
    assert ("CAP_SYS_ADMIN" in feature.needs) is (name == "trigger")
    check_row(feature, packages, guest.pid)
    assert try_feature(name, (), packages, guest.pid) != "works"


@pytest.mark.parametrize("paranoid", ["2", "3"], indirect=True)
def test_the_row_of_rips_is_as_paranoid_as_the_kernel(paranoid: str, packages: Path, guest: GuestProcess) -> None:
    feature = find_features()["RIPs"]
    assert ("CAP_SYS_ADMIN" in feature.needs) is (paranoid == "3")
    check_row(feature, packages, guest.pid)
