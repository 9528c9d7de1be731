"""The pictures are there, small, and shown; what draws them is under licences that let everybody do so."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.agents import ROOT
from tests.pictures.__main__ import DIRECTORY, OTHERS
from tests.pictures.dashboards import HEIGHT, WIDTH, list_pictures
from tests.pictures.png import MOST_BYTES

DASHBOARDS = {picture.name: picture for picture in list_pictures()}
NPM = (ROOT / "tests" / "pictures" / "npm", ROOT / "tests" / "grafana" / "npm")


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, which its first chunk tells."""
    data = path.read_bytes()[:24]
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_pictures_are_those_that_are_drawn() -> None:
    assert {path.stem for path in DIRECTORY.iterdir()} == {*DASHBOARDS, *OTHERS}


@pytest.mark.parametrize("name", [*DASHBOARDS, *OTHERS])
def test_a_picture_is_small_and_shown(name: str) -> None:
    path = DIRECTORY / f"{name}.png"
    assert path.stat().st_size <= MOST_BYTES
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = [
        page
        for page in pages
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())
        if (page.parent / link).resolve() == path
    ]
    assert shown


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_picture_is_a_screen_or_a_whole_page(name: str) -> None:
    width, height = read_size(DIRECTORY / f"{name}.png")
    assert width == WIDTH
    assert height > HEIGHT if DASHBOARDS[name].whole else height == HEIGHT


def find_packages(directory: Path) -> dict[str, dict[str, Any]]:
    lock = json.loads((directory / "package-lock.json").read_text())
    return {name: package for name, package in lock["packages"].items() if name}


@pytest.mark.parametrize("directory", NPM, ids=[directory.parent.name for directory in NPM])
def test_nothing_of_grafana_is_under_the_licence_of_its_server(directory: Path) -> None:
    """@grafana/prometheus and the server are AGPL."""
    packages = find_packages(directory)
    assert len(packages) > 50
    licences = {name: package.get("license", "") for name, package in packages.items()}
    assert {name for name, licence in licences.items() if "GPL" in licence} == set()
    own = {name: licence for name, licence in licences.items() if re.search(r"(@grafana/|/grafana-data-)[^/]+$", name)}
    assert own
    assert set(own.values()) <= {"Apache-2.0", "MIT"}, own


@pytest.mark.parametrize("directory", NPM, ids=[directory.parent.name for directory in NPM])
def test_every_package_is_pinned_by_its_hash(directory: Path) -> None:
    assert [name for name, package in find_packages(directory).items() if "integrity" not in package] == []
