"""Small plots: the rates of some minutes as an SVG drawing with a text that says the same, and rates in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from exporter.history.rates import WINDOW_SECONDS
from exporter.history.steps import Step

WIDTH: Final = 120
HEIGHT: Final = 24
# The right edge moves in steps of this, so that a plot of nothing new stays the same document.
EDGE_SECONDS: Final = 5.0
# So few exits say little of a rate: they are told with the time that they came in.
FEW_EXITS: Final = 5
_UNITS: Final = ((1.0, "s", "second"), (60.0, "min", "minute"), (3600.0, "h", "hour"))


def render_rate(rate: float | None) -> str:
    """Render a rate in a few characters: ``40/s``, ``3/min``; a dash where it is not known."""
    if rate is None:
        return "—"
    number, unit, _ = _choose_unit(rate)
    return f"{number}/{unit}" if rate else "0"


def describe_rate(rate: float | None) -> str:
    """Say a rate: ``40 a second``."""
    if rate is None:
        return "not known"
    if not rate:
        return "none"
    number, _, unit = _choose_unit(rate)
    return f"{number} {'an' if unit == 'hour' else 'a'} {unit}"


def describe_plot(steps: Sequence[Step], rate: float | None) -> str:
    """Say what a plot shows."""
    if not steps:
        return "what it did in the last 5 minutes is not known"
    known = sum(step.ended - step.began for step in steps)
    text = f"{describe_rate(rate)} now, at most {describe_peak(steps)} in the last 5 minutes"
    return text if known > 0.9 * WINDOW_SECONDS else f"{text}, as far as known"


def render_peak(steps: Sequence[Step]) -> str:
    """Render what the top of a plot stands for: ``40/s``, or ``1 in 5 s`` where it is a few exits; "" of none."""
    peak = max(steps, key=lambda step: step.rate, default=None)
    if peak is None or not peak.rate:
        return ""
    if round(peak.exits) < FEW_EXITS:
        return f"{max(1, round(peak.exits))} in {max(1, round(peak.seconds))} s"
    return render_rate(peak.rate)


def describe_peak(steps: Sequence[Step]) -> str:
    """Say what the top of a plot stands for."""
    peak = _find_peak(steps)
    text = render_peak(steps)
    return text if " in " in text else describe_rate(peak)


def render_plot(steps: Sequence[Step], rate: float | None, now: float) -> str:
    """Render the plot, its scale and its text alternative; what is not known is a gap, 0 is a line at the bottom."""
    line, area = draw_paths(steps, now)
    peak = render_peak(steps)
    scale = f"top: {peak}" if peak else "none" if steps else "not known"
    return (
        f'<svg class="plot" role="img" aria-label="{describe_plot(steps, rate)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" preserveAspectRatio="none" focusable="false">'
        f'<path class="area" d="{area}"/><path class="line" d="{line}" vector-effect="non-scaling-stroke"/></svg>'
        f'<span class="soft" aria-hidden="true">{scale}</span>'
    )


def draw_paths(steps: Sequence[Step], now: float) -> tuple[str, str]:
    """Return the path of the line and that of the area below it."""
    edge = math.ceil(now / EDGE_SECONDS) * EDGE_SECONDS
    peak = _find_peak(steps)

    def find_x(seconds: float) -> str:
        return f"{WIDTH * min(1.0, max(0.0, 1 - (edge - seconds) / WINDOW_SECONDS)):.1f}"

    def find_y(rate: float) -> str:
        return f"{HEIGHT - 1 - (HEIGHT - 3) * (rate / peak if peak else 0):.1f}"

    line, area = [], []
    for position, step in enumerate(steps):
        start, end, level = find_x(step.began), find_x(step.ended), find_y(step.rate)
        is_joined = position > 0 and step.began - steps[position - 1].ended < 0.001
        line.append(f"V{level}H{end}" if is_joined else f"M{start} {level}H{end}")
        if step.rate:
            area.append(f"M{start} {HEIGHT}V{level}H{end}V{HEIGHT}z")
    return "".join(line), "".join(area)


def _find_peak(steps: Sequence[Step]) -> float:
    return max((step.rate for step in steps), default=0.0)


def _choose_unit(rate: float) -> tuple[str, str, str]:
    for seconds, unit, word in _UNITS:
        number = rate * seconds
        if number >= 0.95 or rate == 0 or unit == "h":
            text = f"{number:,.0f}" if number >= 9.95 else f"{number:.1f}".removesuffix(".0")
            return text, unit, word
    raise AssertionError("the last unit takes them all")
