"""An agent where lockdown=integrity closes debugfs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.blind.scene import Scene, open_scene
from tests.blind.ways import Sees, Way
from tests.lab.inside.blind import check_way

WAYS = (
    Way(name="lockdown=integrity"),
    Way(name="lockdown=integrity, debugfs only", sources="debugfs", sees=Sees.NONE),
)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with open_scene() as scene:
        yield scene


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(
    way: Way, scene: Scene, record_testsuite_property: Callable[[str, object], None]
) -> None:
    check_way(way, scene, record_testsuite_property)
