"""Debians with the package beside them, for tests that install it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.__main__ import make_packages
from tests.deploy.chroot import Container, make_tree, open_container
from tests.deploy.installed import add_installed_agent


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(path for path in make_packages(tmp_path_factory.mktemp("packages")) if path.suffix == ".deb")


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, package: Path) -> Path:
    """A Debian with the package's file in /opt, not installed."""
    tree = tmp_path_factory.mktemp("debian") / str(request.param)
    make_tree(tree.name, tree)
    (tree / "opt" / package.name).write_bytes(package.read_bytes())
    return tree


@pytest.fixture(scope="module")
def tested_tree(tree: Path, package: Path) -> Path:
    """A Debian with the package installed, and the tests beside it."""
    add_installed_agent(tree, package)
    return tree


@pytest.fixture
def container(tree: Path) -> Iterator[Container]:
    with open_container(tree) as container:
        yield container
