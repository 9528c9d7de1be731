"""Finds securityfs where it is mounted, and opens a private instance of it where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kvm.host.private_mount import PrivateMount


class Securityfs(NamedTuple):
    """Where securityfs is; ``is_private`` where nobody else sees this instance."""

    path: Path
    is_private: bool


@contextmanager
def open_securityfs(sysfs: Path, open_private: Callable[[str], PrivateMount] = PrivateMount) -> Iterator[Securityfs]:
    """Yield where securityfs is; the path is good until the ``with`` block ends.

    Raises OSError where it is not mounted and this process may not open it (CAP_SYS_ADMIN).
    """
    mounted = sysfs / "kernel/security"
    if _has_entries(mounted):
        yield Securityfs(mounted, False)
        return
    private = open_private("securityfs")
    try:
        yield Securityfs(private.path, True)
    finally:
        private.close()


def _has_entries(directory: Path) -> bool:
    """Tell a mounted securityfs, which always has entries, from the empty directory that sysfs keeps for it."""
    try:
        return any(directory.iterdir())
    except PermissionError:
        return True  # sysfs's own directory is open to everybody, so something is mounted there
    except OSError:
        return False
