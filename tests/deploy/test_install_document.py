"""What docs/install.md tells people to run, run: packages, pip, Ansible."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.chroot import Container, has_all_that_it_takes, make_tree, open_container
from tests.deploy.distributions import ROOT
from tests.deploy.installed import find_main_pid, wait_for_agent
from tests.deploy.unit_file import FULL

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a Debian takes root"),
    pytest.mark.skipif(not has_all_that_it_takes(), reason="debootstrap, /dev/kvm or Debian's sources are missing"),
]
DOCUMENT = (ROOT / "docs/install.md").read_text()


def find_block(section: str, language: str = "") -> str:
    """The first block of code of a section."""
    text = DOCUMENT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, section
    return found[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the repository, and nothing that was made of it."""
    clone = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    return clone


@pytest.fixture(scope="module")
def dist(clone: Path) -> Path:
    """What the first command of the document makes."""
    make, apt = find_block("Packages").splitlines()
    assert (make, apt.split()[:2]) == ("make packages", ["apt", "install"])
    done = subprocess.run(make.split(), cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return clone / "dist"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, dist: Path) -> Path:
    tree = tmp_path_factory.mktemp("debian") / "bookworm"
    make_tree("bookworm", tree, "ansible-core", "python3-apt")
    shutil.copytree(dist, tree / "opt/site/dist")
    (tree / "opt/site/kvm-notify-exporter.yml").write_text(find_block("Ansible", "yaml"))
    return tree


@pytest.fixture
def container(tree: Path) -> Iterator[Container]:
    with open_container(tree) as container:
        yield container


def test_packages(container: Container) -> None:
    _, command = find_block("Packages").splitlines()
    purge = re.search(r"`(apt purge [a-z-]+)`", DOCUMENT)
    assert purge is not None
    container.run("sh", "-ec", f"cd /opt/site && {command.replace('apt ', 'apt-get --yes ', 1)}")
    wait_for_agent(container, FULL)
    container.run("sh", "-ec", purge[1].replace("apt ", "apt-get --yes ", 1))
    assert find_main_pid(container, FULL) == ""


def test_ansible(container: Container, tree: Path) -> None:
    play = "cd /opt/site && LC_ALL=C.UTF-8 ansible-playbook --connection=local --inventory=hypervisor, "
    play += "--extra-vars='ansible_become=false' --inventory=/opt/site/hosts kvm-notify-exporter.yml"
    (tree / "opt/site/hosts").write_text("[hypervisors]\nhypervisor\n")
    said = container.run("sh", "-ec", play)
    assert re.search(r"changed=4 .*failed=0", said), said
    wait_for_agent(container, FULL)
    assert "--web.details-group=kvm" in container.run("cat", f"/proc/{find_main_pid(container, FULL)}/cmdline")
    said = container.run("sh", "-ec", play)
    assert re.search(r"changed=0 .*failed=0", said), said


def test_pip(clone: Path, tmp_path: Path) -> None:
    *commands, check = find_block("pip").replace("/opt/kvm-notify-exporter", str(tmp_path / "venv")).splitlines()
    assert len(commands) == 3
    done = subprocess.run(["sh", "-ec", "\n".join(commands)], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = subprocess.run(["sh", "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode in (0, 1)
    assert said.stdout.splitlines()[-1].startswith("verdict ")
