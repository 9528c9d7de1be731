"""The picture of the status page: the simulated host of `demo`, while a vCPU is stuck for the second time."""

from __future__ import annotations

import time
from pathlib import Path

from kvm.simulated.host import CYCLE_SECONDS, STUCK_FROM_SECONDS
from tests.agents import open_known_agent
from tests.live.chromium import open_tab
from tests.pictures.png import shrink

WIDTH, HEIGHT = 1200, 900
# Real time passes in `demo`: so long until the second stall, and then until its graph has something to show.
AGE_SECONDS = CYCLE_SECONDS + STUCK_FROM_SECONDS + 35


def draw_status_page(path: Path) -> None:
    """Write the picture; takes four minutes."""
    with open_known_agent(command="demo") as agent, open_tab() as tab:
        tab.resize(WIDTH, HEIGHT)
        tab.prefer(color_scheme="light")
        tab.open(f"http://127.0.0.1:{agent.port}/")
        time.sleep(AGE_SECONDS)
        tab.wait_until("document.querySelector('.is-stalled .plot .line') !== null")
        # Which machine it was made on is nobody's business.
        tab.evaluate("document.querySelector('header .host').textContent = 'hv-17'")
        tab.make_status_view(path)
    shrink(path)
