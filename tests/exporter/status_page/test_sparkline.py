"""Small plots, and rates in words."""

from __future__ import annotations

import re

import pytest

from exporter.history.steps import Step
from exporter.status_page.sparkline import (
    HEIGHT,
    WIDTH,
    describe_plot,
    describe_rate,
    draw_paths,
    render_plot,
    render_rate,
)


@pytest.mark.parametrize(
    ("rate", "short", "words"),
    [
        (None, "—", "not known"),
        (0.0, "0", "none"),
        (40.0, "40/s", "40 a second"),
        (3.25, "3.2/s", "3.2 a second"),
        (0.05, "3/min", "3 a minute"),
        (0.001, "3.6/h", "3.6 an hour"),
        (12_345.6, "12,346/s", "12,346 a second"),
        (0.0496, "3/min", "3 a minute"),
    ],
)
def test_rates(rate: float | None, short: str, words: str) -> None:
    assert (render_rate(rate), describe_rate(rate)) == (short, words)


def test_a_plot_says_what_it_shows() -> None:
    assert describe_plot([], None) == "what it did in the last 5 minutes is not known"
    steps = [Step(0, 280, 40.0), Step(280, 300, 12.0)]
    assert describe_plot(steps, 12.0) == "12 a second now, at most 40 a second in the last 5 minutes"
    assert describe_plot(steps[1:], 12.0).endswith("in the last 5 minutes, as far as known")


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        ([Step(0, 280, 40.0), Step(280, 300, 12.0)], "top: 40/s"),
        ([Step(0, 15, 0.0), Step(15, 20, 0.2), Step(20, 35, 0.0)], "top: 1 in 5 s"),
        ([Step(0, 60, 0.05)], "top: 3 in 60 s"),
        ([Step(0, 300, 0.0)], "none"),
        ([], "not known"),
    ],
)
def test_the_scale_of_a_plot_can_be_seen(steps: list[Step], scale: str) -> None:
    assert f">{scale}</span>" in render_plot(steps, 0.05, 300)


def test_a_plot_of_single_exits_does_not_contradict_its_rate() -> None:
    steps = [Step(0, 15, 0.0), Step(15, 20, 0.2), Step(20, 35, 0.0)]
    assert describe_plot(steps, 0.05).startswith("3 a minute now, at most 1 in 5 s in the last 5 minutes")


def test_gaps_are_gaps_and_zero_is_a_line() -> None:
    line, area = draw_paths([Step(0, 50, 0.0), Step(50, 100, 2.0), Step(150, 300, 4.0)], 300)
    assert line == f"M0.0 {HEIGHT - 1}.0H20.0V12.5H40.0M60.0 2.0H{WIDTH}.0"
    assert area.count("M") == 2
    assert draw_paths([], 300) == ("", "")
    assert draw_paths([Step(0, 300, 0.0)], 300) == (f"M0.0 {HEIGHT - 1}.0H{WIDTH}.0", "")


def test_a_plot_of_nothing_new_is_the_same_document_for_a_while() -> None:
    steps = [Step(0, 300, 0.0)]
    assert render_plot(steps, 0.0, 300.1) == render_plot(steps, 0.0, 304.9)


def test_a_plot_needs_no_style_attribute_and_nothing_from_elsewhere() -> None:
    svg = render_plot([Step(0, 10, 1.0)], 1.0, 10)
    assert not re.search(r"style=|href|http|url", svg)
    assert 'role="img"' in svg
