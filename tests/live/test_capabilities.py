"""Each row of the table of capabilities that `check` prints: enough with all others dropped, and none too many."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvm.host.lockdown import read_lockdown
from kvm.host.privileges import Feature, read_privileges
from tests.live import feature_probe, open_guest_process

ROOT = Path(__file__).parents[2]
PROBE = Path(feature_probe.__file__)
# Debian's, which everybody may run: the one of a virtual environment may lie in somebody's home.
PYTHON = "/usr/bin/python3"
NOBODY = 65534
NAME = "instance-0000002a"
# A VM in a container: a run directory of its own, where nobody but root looks.
CONTAINER = 'mount -t tmpfs -o mode=0755 tmpfs /run && mkdir -p -m 0700 /run/libvirt/qemu && exec "$@"'

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to drop"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"{PYTHON} is missing"),
]
FEATURES = {feature.name: feature for feature in replace(read_privileges(), uid=NOBODY).find_features()}


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    """The probe and the package that it takes, where everybody may read them."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        shutil.copytree(ROOT / "kvm", Path(directory) / "kvm", ignore=shutil.ignore_patterns("__pycache__", "patches"))
        shutil.copy(PROBE, directory)
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
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


def try_feature(feature: Feature, held: Sequence[str], packages: Path, pid: int) -> str:
    """What the probe says as nobody, with these capabilities and no others."""
    names = ",".join(["-all", *(f"+{name.lower().removeprefix('cap_')}" for name in held)])
    kept = [f"--inh-caps={names}", f"--ambient-caps={names}", f"--bounding-set={names}", "--no-new-privs"]
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    probe = [PYTHON, "-I", str(packages / PROBE.name), str(packages), feature.name, str(pid)]
    done = subprocess.run(
        ["setpriv", *kept, *user, *probe], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def why_not_here(name: str) -> str:
    """Why a feature cannot work on this host, whatever is held; "" where it can."""
    if name == "source debugfs" and read_lockdown(Path("/sys")).mode != "none":
        return "lockdown closes the counters in debugfs; the lab has a kernel without"
    if name == "trigger" and " handle_notify\n" not in Path("/proc/kallsyms").read_text().replace("\t", "\n"):
        return "this kernel's KVM takes no notify exits; the lab's does"
    return ""


def test_every_feature_of_the_table_is_probed() -> None:
    assert FEATURES.keys() == feature_probe.FEATURES.keys()


@pytest.mark.parametrize("name", [name for name in FEATURES if not why_not_here(name)])
def test_a_row_is_enough_and_nothing_in_it_is_too_much(name: str, packages: Path, guest_pid: int) -> None:
    feature = FEATURES[name]
    assert try_feature(feature, feature.needs, packages, guest_pid) == "works"
    for missing in feature.needs:
        held = [capability for capability in feature.needs if capability != missing]
        said = try_feature(feature, held, packages, guest_pid)
        assert said != "works", f"{name} does without {missing}"
        assert said != ""


@pytest.mark.parametrize("name", list(FEATURES))
def test_without_any_capability_nothing_works(name: str, packages: Path, guest_pid: int) -> None:
    assert try_feature(FEATURES[name], (), packages, guest_pid) != "works"
