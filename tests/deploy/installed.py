"""What tests do with an agent that the package has installed, and how tests get to where it is.

They are put into the tree's /srv. They need Debian's Python and what the package depends on, and pytest and hypothesis,
which the installed agent does not see: it looks for modules in the system only.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.chroot import Container, run_on_host
from tests.lab.apt import LabError
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROGRAMS = ("promtool", "prometheus")
TEST_PACKAGES = ("pytest", "hypothesis")
PROJECT = "/srv/project"
ENVIRONMENT = (
    f"PYTHONPATH=/srv/packages/site-packages:{PROJECT}",
    "PYTHONDONTWRITEBYTECODE=1",
    "PATH=/srv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "KVM_NOTIFY_EXPORTER=/usr/bin/kvm-notify-exporter",
    "KVM_LAB_INSIDE=1",
    "KVM_TESTS_MUST_RUN=1",
)


def add_installed_agent(tree: Path, package: Path) -> None:
    """Install the package in a tree, and put the tests beside it."""
    run_on_host(tree, "dpkg", "--install", f"/opt/{package.name}")
    add_tests(tree, package)


def add_tests(tree: Path, package: Path) -> None:
    """Put the project's tests into /srv of a tree: what they test is what the package has installed."""
    srv = tree / "srv"
    project = srv / "project"
    for part in ("tests", "grafana"):
        ignored = shutil.ignore_patterns("__pycache__", "npm")
        shutil.copytree(ROOT / part, project / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", project)
    for name in ("exporter", "kvm"):
        (project / name).symlink_to(f"/usr/lib/kvm-notify-exporter/{name}")
    shutil.copy(package, srv / "package.deb")
    install_tests_packages(tree, srv / "packages/site-packages")
    (srv / "bin").mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is None:
            raise LabError(f"there is no {name} here: apt-get install prometheus")
        shutil.copy(found, srv / "bin")
    # Under emulation, to compile is most of what a program does at its start.
    run_on_host(tree, "python3", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", "/srv")


def install_tests_packages(tree: Path, site: Path) -> None:
    """Install pytest and what else the tests take, at our versions, for the tree's own Python."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = run_on_host(tree, "python3", "-c", program).strip()
    names = [f"{name}=={importlib.metadata.version(name)}" for name in TEST_PACKAGES]
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", f"--target={site}"]
    words += [f"--python-version={version}", "--only-binary=:all:", *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"pip cannot install {', '.join(names)} for Python {version}: {done.stderr[-2000:]}")


def install(container: Container, package: Path) -> None:
    container.run("dpkg", "--install", f"/opt/{package.name}")


def find_main_pid(container: Container, unit: str) -> str:
    """The agent's pid, "" where none runs."""
    return container.show(unit, "MainPID").removeprefix("0")


def wait_for_agent(container: Container, unit: str) -> None:
    def has_seen() -> bool:
        return find_main_pid(container, unit) != "" and "kvm_exporter_snapshot" in container.get("/metrics")[1]

    wait_until(has_seen, lambda: read_journal(container, unit), seconds=60, pause_seconds=0.5)


def read_journal(container: Container, unit: str) -> str:
    return container.run("journalctl", "--no-pager", f"--unit={unit}")


def find_new_pid(container: Container, unit: str, before: str) -> str:
    """Wait for another agent than the one before; returns its pid."""

    def find() -> str:
        pid = find_main_pid(container, unit)
        return pid if pid != before and container.show(unit, "ActiveState") == "active" else ""

    wait_until(find, lambda: read_journal(container, unit), seconds=60, pause_seconds=0.2)
    return find()
