"""The lockdown mode: read where securityfs is, and through a private instance where it is not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvm.host.lockdown import Lockdown, read_lockdown
from kvm.host.private_mount import PrivateMount
from tests.own_mounts import UNMOUNT_ALL


def refuse(file_system: str) -> PrivateMount:
    raise OSError(errno.EPERM, "Operation not permitted", file_system)


def write(sysfs: Path, name: str, text: str) -> None:
    path = sysfs / "kernel/security" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_mounted_securityfs_is_read(tmp_path: Path) -> None:
    write(tmp_path, "lockdown", "none [integrity] confidentiality\n")
    assert read_lockdown(tmp_path, refuse) == Lockdown("integrity")


def test_a_kernel_without_lockdown_has_none(tmp_path: Path) -> None:
    write(tmp_path, "lsm", "capability,yama")
    assert read_lockdown(tmp_path, refuse) == Lockdown("none", "the kernel is built without lockdown")


def test_what_may_not_be_opened_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "kernel/security").mkdir(parents=True)
    note = "securityfs is not mounted, and this process may not open it (Operation not permitted)"
    assert read_lockdown(tmp_path, refuse) == Lockdown("", note)


def test_a_mode_that_may_not_be_read_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "kernel/security/lockdown").mkdir(parents=True)  # EISDIR, also to root
    found = read_lockdown(tmp_path, refuse)
    assert found.mode == ""
    assert found.note.endswith("kernel/security/lockdown: Is a directory")


PRINT = """
from pathlib import Path
from kvm.host.lockdown import read_lockdown
print(tuple(read_lockdown(Path("/sys"))))
"""


@pytest.mark.live
def test_where_nothing_is_mounted_a_private_instance_is_read_and_nobody_sees_it() -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root to unmount in a namespace")
    script = f'{UNMOUNT_ALL}; cat /proc/self/mountinfo | wc -l; "$@"; cat /proc/self/mountinfo | wc -l'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", PRINT]
    before, said, after = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    mode = read_lockdown(Path("/sys")).mode
    assert said == str((mode, "securityfs is not mounted: read through a private instance"))
    assert before == after
