"""A crowd of VMs for the benchmarks: it is there as a whole or not at all."""

from __future__ import annotations

import psutil
import pytest

from tests.bench.crowd import open_crowd
from tests.waiting import wait_until

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kill_first", [True, False], ids=["a member", "its maker"])
def test_who_has_lost_one_is_gone(kill_first: bool) -> None:
    before = set(psutil.Process().children())
    with open_crowd(3, 1) as crowd:
        crowd.run()
        crowd.run(2)
        (maker,) = set(psutil.Process().children()) - before
        members = maker.children()
        assert len(members) == 3
        (members[0] if kill_first else maker).kill()
        wait_until(lambda: not any(member.is_running() for member in members), "no member is left")
