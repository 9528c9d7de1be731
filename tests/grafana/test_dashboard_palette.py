"""The colours of the dashboards are told apart by everybody, whatever they see of red, green and blue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from grafana.builder.colors import BAD, GOOD, PALETTE, WARN
from tests.grafana.color_vision import SIGHTS, measure_contrast, measure_distance
from tests.grafana.dashboard_queries import read_dashboards

# Nearly ten times what is just seen side by side: small text in one cell, and a line in another. What is well, what is
# doubtful and what is bad are further apart.
DISTANCE, DISTANCE_OF_VERDICTS = 20.0, 35.0
# Grafana's panels, dark and light; WCAG asks for 3 of large text.
DARK, LIGHT = "#181b1f", "#ffffff"


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PALETTE, 2)))
def test_two_colors_are_told_apart(one: str, other: str, sight: str) -> None:
    assert measure_distance(one, other, sight) >= DISTANCE


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations((GOOD, WARN, BAD), 2)))
def test_verdicts_are_far_apart(one: str, other: str, sight: str) -> None:
    assert measure_distance(one, other, sight) >= DISTANCE_OF_VERDICTS


def test_grafanas_own_green_and_red_are_one() -> None:
    """What this palette is in place of, so that the tests above are known to be able to fail."""
    assert measure_distance("#73BF69", "#F2495C", "common") > 100
    assert measure_distance("#73BF69", "#F2495C", "deuteranopia") < DISTANCE


@pytest.mark.parametrize("color", PALETTE)
def test_a_color_stands_out_from_the_background(color: str) -> None:
    assert measure_contrast(color, DARK) >= 3
    assert measure_contrast(color, LIGHT) >= 1.6


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("#000000", "#ffffff", 100.0), ("#ff0000", "#00ff00", 170.6), ("#7d828a", "#7d828a", 0)],
)
def test_distances_are_those_of_the_standard(one: str, other: str, wanted: float) -> None:
    assert measure_distance(one, other, "common") == pytest.approx(wanted, abs=0.1)


def find_colors(part: object) -> Iterator[str]:
    """Colours of thresholds, mappings, lines and marks."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in {"color", "fixedColor", "iconColor"} and isinstance(value, str):
                yield value
            else:
                yield from find_colors(value)
    elif isinstance(part, list):
        for inner in part:
            yield from find_colors(inner)


def test_dashboards_have_no_other_colors() -> None:
    used: set[str] = set()
    for dashboard in read_dashboards():
        own = [one for one in dashboard["annotations"]["list"] if not one.get("builtIn")]
        used |= {*find_colors(dashboard["panels"]), *find_colors(own)}
    assert used == {*PALETTE, "text"}
