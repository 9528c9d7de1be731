"""The .rpm, installed by rpm under a real systemd. The system is a Debian: there, rpm cannot see what is installed.

So its dependencies are not judged (``--nodeps``), but files, scripts and units are what they are on Fedora or RHEL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.__main__ import make_packages
from tests.deploy.chroot import Container, find_files, has_all_that_it_takes, make_tree, open_container
from tests.deploy.installed import find_main_pid, find_new_pid, wait_for_agent
from tests.deploy.unit_file import FULL, NO_ADMIN

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
]
# What Fedora's own packages have, and Debian not.
SHARED = ("zsh/site-functions", "fish", "fish/vendor_completions.d", "licenses")
NOT_OURS = {f"./usr/share/{name}" for name in SHARED}
RPM = ("rpm", "--dbpath=/var/lib/rpm", "--nodeps")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("debian") / "bookworm"
    make_tree("bookworm", tree, "rpm")
    for path in make_packages(tmp_path_factory.mktemp("packages")):
        if path.suffix == ".rpm":
            (tree / "opt/package.rpm").write_bytes(path.read_bytes())
    return tree


@pytest.fixture
def container(tree: Path) -> Iterator[Container]:
    with open_container(tree) as container:
        yield container


def test_the_life_of_an_rpm(container: Container, tree: Path, tell: Callable[[str], None]) -> None:
    before = find_files(tree)
    container.run(*RPM, "--install", "/opt/package.rpm")
    assert container.run("rpm", "--dbpath=/var/lib/rpm", "--query", "kvm-notify-exporter").startswith("kvm-notify-")
    assert container.run("rpm", "--dbpath=/var/lib/rpm", "--verify", "--nodeps", "kvm-notify-exporter") == ""
    assert find_main_pid(container, FULL) == "", "rpm starts nothing: presets and administrators decide"
    container.run("systemctl", "enable", "--now", FULL)
    wait_for_agent(container, FULL)
    user = container.run("id", "--user", "kvm-notify-exporter").strip()
    pid = find_main_pid(container, FULL)
    assert container.run("stat", "--format=%u", f"/proc/{pid}").strip() in (user, "0")  # not dumpable: root's
    assert f"Uid:\t{user}\t{user}\t{user}\t{user}" in container.run("cat", f"/proc/{pid}/status")

    # An upgrade starts the new program, and keeps what the administrator has set.
    defaults = tree / "etc/default/kvm-notify-exporter"
    defaults.write_text('ARGS="--log.level=debug"\n')
    container.run(*RPM, "--upgrade", "--replacepkgs", "/opt/package.rpm")
    find_new_pid(container, FULL, pid)
    wait_for_agent(container, FULL)
    assert "--log.level=debug" in defaults.read_text()
    container.run("systemctl", "start", NO_ADMIN)
    wait_for_agent(container, NO_ADMIN)
    assert container.list_failed() == ""

    container.run(*RPM, "--erase", "kvm-notify-exporter")
    assert find_main_pid(container, FULL) == find_main_pid(container, NO_ADMIN) == ""
    ours = ("./var/lib/rpm", "./etc/default")
    left = {path for path in find_files(tree) - before - NOT_OURS if not path.startswith(ours)}
    assert left == {"./var/lib/kvm-notify-exporter", "./var/lib/kvm-notify-exporter/state.json"}
    tell("bookworm: the .rpm installed, started, upgraded and erased by rpm, under systemd")
