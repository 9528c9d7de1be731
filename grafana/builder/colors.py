"""Colours of what is shown, and the texts that values are shown as.

What is not known is grey, and never the colour of health: Grafana gives null and no data the colour of a threshold's
base, so the base is neutral everywhere and green begins at a known 0.

The colours are told apart also by people who see no red, no green or no blue: a test simulates their sight. Of
Grafana's own, green and red are one colour to who sees no green.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

Mappings = list[dict[str, Any]]
Thresholds = Sequence[tuple[float | None, str]]

GOOD: Final = "#7bc59f"
WARN: Final = "#f3be00"
BAD: Final = "#d2362d"
OTHER: Final = "#5f78f9"
UNKNOWN: Final = "#dfa6f9"
# As far from Grafana's dark background as from its light one.
NEUTRAL: Final = "#7d828a"
PALETTE: Final = (GOOD, WARN, BAD, OTHER, UNKNOWN, NEUTRAL)

# Every number that is shown is 0 or more.
PLAIN: Final[Thresholds] = ((None, NEUTRAL), (0, "text"))
GREEN_UNTIL_ONE: Final[Thresholds] = ((None, NEUTRAL), (0, GOOD), (1, BAD))
# Every stall is bad, however short.
STALLED_FOR: Final[Thresholds] = ((None, NEUTRAL), (0, BAD))
WARN_FROM_ONE: Final[Thresholds] = ((None, NEUTRAL), (0, GOOD), (1, WARN))
# Of what is no whole number: however little above 0.
WARN_ABOVE_ZERO: Final[Thresholds] = ((None, NEUTRAL), (0, GOOD), (1e-9, WARN))


def map_values(**texts: tuple[str, str]) -> Mappings:
    """Return how values are shown: their text and its colour; ``_0`` is the number 0."""
    options = {
        value.removeprefix("_"): {"color": color, "index": index, "text": text}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return [{"options": options, "type": "value"}]


# What zero means is told apart everywhere by the same words and colours.
PROTECTION_COLORS: Final = {"armed": GOOD, "off": WARN, "unsupported": OTHER, "unknown": UNKNOWN}
PROTECTION: Final = map_values(**{state: (state, color) for state, color in PROTECTION_COLORS.items()})
YES_NO: Final = map_values(_0=("no", WARN), _1=("yes", GOOD))
IS_BAD: Final = map_values(_0=("no", GOOD), _1=("yes", BAD))
STALLED: Final = map_values(_0=("not stalled", GOOD), _1=("stalled", BAD))
SCRAPED: Final = map_values(_0=("down", BAD), _1=("up", GOOD))
WORKS: Final = map_values(_0=("does not work", WARN), _1=("works", GOOD))
SEVERITY: Final = map_values(page=("page", BAD), ticket=("ticket", WARN))
CANNOT_TELL: Final = map_values(down=("down", BAD), blind=("blind", WARN))
MISSING: Final = map_values(_1=("VMs may be missing", WARN))


def render_thresholds(steps: Thresholds) -> dict[str, Any]:
    """Return thresholds as a dashboard has them."""
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in steps]}
