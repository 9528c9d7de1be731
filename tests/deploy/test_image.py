"""The Containerfile, built and run by a rootless podman on a Debian of debootstrap's: no registry is asked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from deploy.__main__ import make_packages
from tests.deploy.chroot import ASK, has_all_that_it_takes, make_archive
from tests.deploy.distributions import ROOT
from tests.deploy.rootless import Podman
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]
BASE, IMAGE = "localhost/debian:bookworm", "localhost/kvm-notify-exporter:test"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory that everybody may enter, as pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="image-") as directory:
        path = Path(directory)
        path.chmod(0o711)
        yield path


@pytest.fixture(scope="module")
def podman(directory: Path) -> Iterator[Podman]:
    (directory / "podman").mkdir()
    podman = Podman(directory / "podman")
    try:
        yield podman
    finally:
        podman.close()


@pytest.fixture(scope="module")
def image(podman: Podman, directory: Path) -> str:
    """The image, built of what `make packages` makes."""
    base, context = directory / "base.tar", directory / "dist"
    shutil.copy(make_archive("bookworm"), base)
    make_packages(context)
    shutil.copy(ROOT / "deploy/Containerfile", directory)
    for path in (base, directory / "Containerfile", *context.iterdir()):
        path.chmod(0o644)
    podman.run("import", str(base), BASE)
    # What runs while it is built is no more contained than the user is: that takes no cgroups.
    words = ["--isolation=chroot", "--network=host", f"--build-arg=BASE={BASE}", f"--tag={IMAGE}"]
    podman.run("build", *words, f"--file={directory}/Containerfile", str(context))
    return IMAGE


def read_pod() -> dict[str, object]:
    manifest = yaml.safe_load((ROOT / "deploy/kubernetes/base/daemonset.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    found: dict[str, object] = container
    return found


def test_the_image_serves_as_the_manifest_starts_it(podman: Podman, image: str, tell: Callable[[str], None]) -> None:
    version = podman.run("run", "--rm", "--network=none", image, "--version").strip()
    assert version.startswith("kvm-notify-exporter ")
    arguments = read_pod()["args"]
    assert isinstance(arguments, list)
    words = ["--detach", "--name=agent", "--read-only", "--network=none", "--cap-drop=ALL"]
    podman.run("run", *words, "--tmpfs=/run/kvm-notify-exporter", image, *arguments)

    def ask(path: str) -> str:
        return podman.run("exec", "agent", "python3", "-c", ASK, path, "9750").partition("\n")[0]

    wait_until(lambda: ask("/-/healthy") == "200", lambda: podman.run("logs", "agent"), 120, pause_seconds=1)
    assert ask("/-/ready") == "503", "it has no host to see"
    podman.run("stop", "--time=10", "agent")
    state = podman.run("inspect", "--format={{.State.ExitCode}}", "agent").strip()
    assert state == "0"
    size = int(podman.run("image", "inspect", "--format={{.Size}}", image))
    tell(f"{version}: the image was built and run by a rootless podman, {size >> 20} MiB")


def test_check_in_the_image_says_that_it_is_blind(podman: Podman, image: str) -> None:
    text = podman.run("run", "--rm", "--network=none", "--read-only", image, "check", expect=(1,))
    assert "run with hostPID: true" in text
