"""Which securityfs is looked into: the mounted one before a private instance."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvm.host.private_mount import PrivateMount
from kvm.host.securityfs import Securityfs, open_securityfs


class Instance:
    """In the place of a private instance: where it is, and whether it was closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def refuse(file_system: str) -> PrivateMount:
    raise OSError(errno.EPERM, "Operation not permitted", file_system)


def test_a_mounted_one_is_preferred(tmp_path: Path) -> None:
    mounted = tmp_path / "kernel/security"
    mounted.mkdir(parents=True)
    (mounted / "lsm").write_text("capability")
    with open_securityfs(tmp_path, refuse) as found:
        assert found == Securityfs(mounted, False)


@pytest.mark.parametrize("has_directory", [True, False])
def test_a_private_one_is_closed_whatever_happens(tmp_path: Path, has_directory: bool) -> None:
    if has_directory:
        (tmp_path / "kernel/security").mkdir(parents=True)
    instance = Instance(tmp_path)
    asked = []

    def open_private(file_system: str) -> PrivateMount:
        asked.append(file_system)
        return instance  # type: ignore[return-value]

    with pytest.raises(ZeroDivisionError), open_securityfs(tmp_path, open_private) as found:
        assert found == Securityfs(tmp_path, True)
        assert instance.closed == 0
        raise ZeroDivisionError
    assert (asked, instance.closed) == (["securityfs"], 1)


def test_one_that_may_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), open_securityfs(tmp_path, refuse):
        raise AssertionError("nothing was there to be opened")
