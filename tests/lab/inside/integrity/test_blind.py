"""An agent where lockdown=integrity closes debugfs."""

from __future__ import annotations

import pytest

from tests.blind.scene import Scene
from tests.blind.ways import Sees, Way
from tests.lab.inside.blind.check import Record, check_way

pytestmark = pytest.mark.one_kernel

WAYS = (
    Way(name="lockdown=integrity"),
    Way(name="lockdown=integrity, debugfs only", sources="debugfs", sees=Sees.NONE),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(
    way: Way, scene: Scene, record_testsuite_property: Record
) -> None:
    check_way(way, scene, record_testsuite_property)
