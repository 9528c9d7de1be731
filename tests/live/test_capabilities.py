"""Each row of the table of capabilities that `check` prints: enough with all others dropped, and none too many."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvm.host.lockdown import read_lockdown
from kvm.host.privileges import read_privileges
from tests.blind import refuse_syscalls
from tests.live import feature_probe, open_guest_process
from tests.live.feature_rows import PYTHON, ROOT, check_row, copy_packages, find_features, try_feature
from tests.own_mounts import UNMOUNT_ALL

NAME = "instance-0000002a"
# A VM in a container: a run directory of its own, where nobody but root looks.
CONTAINER = 'mount -t tmpfs -o mode=0755 tmpfs /run && mkdir -p -m 0700 /run/libvirt/qemu && exec "$@"'
# A machine on which nobody has mounted what the agent looks into.
BARE = ("unshare", "--mount", "sh", "-c", f'{UNMOUNT_ALL}; exec "$@"', "sh")

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to drop"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"{PYTHON} is missing"),
]
FEATURES = find_features()
BARE_FEATURES = find_features(replace(read_privileges(), mounted=frozenset()))


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy_packages(Path(directory))
        yield Path(directory)


@pytest.fixture(scope="module")
def guest_pid() -> Iterator[int]:
    """A VM of root's in a container, with stats fds, whose libvirt knows its project."""
    prefix = ("unshare", "--mount", "--propagation=private", "sh", "-c", CONTAINER, "sh")
    with open_guest_process(name=NAME, stats_fds=True, port_writes=100, prefix=prefix) as guest:
        status = (ROOT / "tests/fixtures/owners/libvirt-openstack/status.xml").read_text()
        status = re.sub(r"(<domstatus [^>]*pid=)'\d+'", rf"\1'{guest.pid}'", status)
        assert f"<name>{NAME}</name>" in status
        path = Path("/proc", str(guest.pid), "root", "run/libvirt/qemu", f"{NAME}.xml")  # in its mount namespace
        path.write_text(status)
        path.chmod(0o600)
        yield guest.pid


def why_not_here(name: str) -> str:
    """Why a feature cannot work on this host, whatever is held; "" where it can."""
    if name == "source debugfs" and read_lockdown(Path("/sys")).mode != "none":
        return "lockdown closes the counters in debugfs; the lab has a kernel without"
    if name == "trigger" and " handle_notify\n" not in Path("/proc/kallsyms").read_text().replace("\t", "\n"):
        return "this kernel's KVM takes no notify exits, and may refuse programs at functions; the lab's does not"
    return ""


def test_every_feature_of_the_table_is_probed() -> None:
    assert FEATURES.keys() == feature_probe.FEATURES.keys()


@pytest.mark.parametrize("name", [name for name in FEATURES if not why_not_here(name)])
def test_a_row_is_enough_and_nothing_in_it_is_too_much(name: str, packages: Path, guest_pid: int) -> None:
    check_row(FEATURES[name], packages, guest_pid)


@pytest.mark.parametrize("answer", ["ENOSYS", "EPERM"])
def test_owners_do_without_openat2(answer: str, packages: Path, guest_pid: int) -> None:
    """As under systemd's RestrictSUIDSGID=, whose filter says ENOSYS, and in old containers."""
    feature = FEATURES["owners"]
    prefix = (PYTHON, "-I", refuse_syscalls.__file__, f"openat2={answer}")
    assert try_feature(feature.name, feature.needs, packages, guest_pid, prefix) == "works"


@pytest.mark.parametrize("name", ["RIPs", "lockdown"])
def test_a_row_where_nothing_is_mounted(name: str, packages: Path, guest_pid: int) -> None:
    assert "CAP_SYS_ADMIN" in BARE_FEATURES[name].needs
    check_row(BARE_FEATURES[name], packages, guest_pid, BARE)


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if feature.needs])
def test_without_any_capability_nothing_works(name: str, packages: Path, guest_pid: int) -> None:
    assert try_feature(name, (), packages, guest_pid) != "works"
