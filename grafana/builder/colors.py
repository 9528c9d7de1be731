"""Colours of what is shown, and the texts that values are shown as.

What is not known is grey, and never the colour of health: Grafana gives null and no data the colour of a threshold's
base, so the base is neutral everywhere and green begins at a known 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grafana.builder.layout import Json

Mappings = list[Json]
Thresholds = Sequence[tuple[float | None, str]]

# As far from Grafana's dark background as from its light one.
NEUTRAL: Final = "#7d828a"

# Every number that is shown is 0 or more.
PLAIN: Final[Thresholds] = ((None, NEUTRAL), (0, "text"))
GREEN_UNTIL_ONE: Final[Thresholds] = ((None, NEUTRAL), (0, "green"), (1, "red"))
# Every stall is bad, however short.
STALLED_FOR: Final[Thresholds] = ((None, NEUTRAL), (0, "red"))
WARN_FROM_ONE: Final[Thresholds] = ((None, NEUTRAL), (0, "green"), (1, "orange"))


def map_values(**texts: tuple[str, str]) -> Mappings:
    """Return how values are shown: their text and its colour; ``_0`` is the number 0."""
    options = {
        value.removeprefix("_"): {"color": color, "index": index, "text": text}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return [{"options": options, "type": "value"}]


# What zero means is told apart everywhere by the same words and colours.
PROTECTION_COLORS: Final = {"armed": "green", "off": "orange", "unsupported": "blue", "unknown": "purple"}
PROTECTION: Final = map_values(**{state: (state, color) for state, color in PROTECTION_COLORS.items()})
YES_NO: Final = map_values(_0=("no", "orange"), _1=("yes", "green"))
BAD: Final = map_values(_0=("no", "green"), _1=("yes", "red"))
STALLED: Final = map_values(_0=("not stalled", "green"), _1=("stalled", "red"))
WORKS: Final = map_values(_0=("does not work", "orange"), _1=("works", "green"))
SEVERITY: Final = map_values(page=("page", "red"), ticket=("ticket", "orange"))
MISSING: Final = map_values(_1=("VMs may be missing", "orange"))


def render_thresholds(steps: Thresholds) -> Json:
    """Return thresholds as a dashboard has them."""
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in steps]}
