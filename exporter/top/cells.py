"""Text in the cells of a table in a terminal: as wide as it looks there, and numbers that stay short."""

from __future__ import annotations

import unicodedata
from typing import Final

from kvm.statistics import StatDescriptor, StatUnit

UNKNOWN: Final = "-"
_LARGE: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def measure_width(text: str) -> int:
    """Return how many columns printable text takes: East Asian letters and most emoji two, marks upon a letter none."""
    if text.isascii():
        return len(text)
    return sum(map(_measure_letter, text))


def _measure_letter(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Return printable text in exactly so many columns: filled up with spaces, or cut, which an ellipsis shows."""
    missing = width - measure_width(text)
    if missing < 0:
        text = cut(text, width)
        missing = width - measure_width(text)  # half of a wide letter
    return " " * missing + text if right else text + " " * missing


def cut(text: str, width: int) -> str:
    """Return printable text in at most so many columns."""
    if measure_width(text) <= width:
        return text
    kept, used = "", 0
    for letter in text:
        used += _measure_letter(letter)
        if used > width - 1:
            break
        kept += letter
    return (kept + "…")[: max(0, width)]


def render_amount(amount: float | None, descriptor: StatDescriptor) -> str:
    """Render a rate of what only grows, else a value. Seconds per second are a part of the time: per cent."""
    if amount is None:
        return UNKNOWN
    if descriptor.is_cumulative and descriptor.unit is StatUnit.SECONDS:
        return f"{render_quantity(amount * 100)}%"
    return render_quantity(amount)


def render_quantity(amount: float) -> str:
    """Render a number with at most eight characters; what is not 0 is not shown as 0."""
    if amount < 0:
        return f"-{render_quantity(-amount)}"
    for scale, letter in _LARGE:
        if amount >= scale:
            return f"{amount / scale:.2f}{letter}" if amount < 1000 * scale else f"{amount:.1e}"
    if amount == int(amount) or amount >= 999.5:
        return f"{amount:,.0f}"
    return f"{amount:.1f}" if amount >= 0.05 else "<0.1"


def render_value(value: int | None, descriptor: StatDescriptor) -> str:
    """Render a value to its last digit, with its unit."""
    if value is None:
        return UNKNOWN
    scaled = value * descriptor.scale
    number = f"{scaled.numerator:,}" if scaled.denominator == 1 else f"{float(scaled):,.3f}"
    units = {StatUnit.SECONDS: " s", StatUnit.BYTES: " B", StatUnit.CYCLES: " cycles"}
    return number + units.get(descriptor.unit, "")
