"""Renews docs/pictures: ``python -m tests.pictures``, or those that are named: ``python -m tests.pictures fleet``."""

from __future__ import annotations

import sys

from tests.agents import ROOT
from tests.pictures.dashboards import draw_dashboards, list_pictures
from tests.pictures.status_page import draw_status_page
from tests.pictures.terminal import draw_terminal

OTHERS = {"status-page": draw_status_page, "terminal": draw_terminal}
DIRECTORY = ROOT / "docs" / "pictures"


def main(names: list[str]) -> int:
    """Draw those, or all."""
    dashboards = {picture.name: picture for picture in list_pictures()}
    wanted = set(names) or {*dashboards, *OTHERS}
    if unknown := wanted - {*dashboards, *OTHERS}:
        print(f"no such picture: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    if drawn := [picture for name, picture in dashboards.items() if name in wanted]:
        draw_dashboards(DIRECTORY, drawn)
    for name, draw in OTHERS.items():
        if name in wanted:
            draw(DIRECTORY / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
