"""A private instance: seen by nobody, and without effect on what others have mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvm.host.private_mount import PrivateMount
from tests.own_mounts import FILE_SYSTEMS

pytestmark = pytest.mark.live

# What the product opens so; the others are there to show that it could.
NAMES = ("tracefs", "securityfs", "debugfs")


@pytest.fixture(autouse=True)
def takes_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("takes CAP_SYS_ADMIN")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_only_seen_by_nobody_and_gone_when_closed(name: str) -> None:
    mountinfo = Path("/proc/self/mountinfo").read_text()
    place = Path(FILE_SYSTEMS[name])
    mounted = place.stat()
    fds = len(os.listdir("/proc/self/fd"))
    private = PrivateMount(name)
    assert any(private.path.iterdir())
    assert os.statvfs(private.path).f_flag & os.ST_RDONLY
    assert Path("/proc/self/mountinfo").read_text() == mountinfo
    after = place.stat()  # all mounts share one superblock: its mode and group are not ours to reset
    assert (after.st_mode, after.st_uid, after.st_gid) == (mounted.st_mode, mounted.st_uid, mounted.st_gid)
    path = private.path
    private.close()
    private.close()
    assert not path.exists()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_file_system_that_the_kernel_does_not_have() -> None:
    with pytest.raises(OSError, match="No such device"):
        PrivateMount("nonefs")
