"""Makes the picture of the status page that the documents show: ``python -m tests.live.screenshot``.

The simulated host of `demo`, some minutes after its start, while a vCPU is stuck for the second time.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.agents import open_known_agent
from tests.live.chromium import open_tab

PATH = Path(__file__).parents[2] / "docs" / "status-page.png"
WIDTH = 1200
AGE_SECONDS = 120 + 15 + 35


def main() -> None:
    PATH.parent.mkdir(exist_ok=True)
    with open_known_agent(command="demo") as agent, open_tab() as tab:
        tab.resize(WIDTH, 900)
        tab.prefer(color_scheme="light")
        tab.open(f"http://127.0.0.1:{agent.port}/")
        time.sleep(AGE_SECONDS)
        tab.wait_until("document.querySelector('.is-stalled .plot .line') !== null")
        # Which machine it was made on is nobody's business.
        tab.evaluate("document.querySelector('header .host').textContent = 'hv-17'")
        tab.make_status_view(PATH)
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
