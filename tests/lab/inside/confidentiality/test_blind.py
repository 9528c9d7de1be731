"""An agent where lockdown=confidentiality closes BPF as well."""

from __future__ import annotations

import pytest

from tests.blind.scene import Scene
from tests.blind.ways import Sees, Way
from tests.lab.inside.blind.check import Record, check_way
from tests.lab.inside.confidentiality.test_confidentiality import locked_down

__all__ = ["locked_down"]
pytestmark = [pytest.mark.usefixtures("locked_down"), pytest.mark.one_kernel]

WAYS = (
    Way(name="lockdown=confidentiality", sees=Sees.SOME),
    Way(name="lockdown=confidentiality, bpf only", sources="bpf", sees=Sees.NONE),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_surface_claims_more_than_root_can_confirm(
    way: Way, scene: Scene, record_testsuite_property: Record
) -> None:
    answers = check_way(way, scene, record_testsuite_property)
    assert "lockdown=confidentiality" in answers.check.text
