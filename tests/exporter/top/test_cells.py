"""Text in cells: as wide as a terminal shows it, and numbers that stay short."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.top.cells import cut, fit, measure_width, render_amount, render_quantity, render_value
from exporter.untrusted_text import clean_name
from kvm.statistics import StatDescriptor, StatKind, StatScope, StatUnit
from tests.exporter.top.scene import BLOCKED, HALTS, PAGES


@pytest.mark.parametrize(
    ("text", "width"),
    [("web-1", 5), ("日本", 4), ("Việt", 4), ("e\u0301", 1), ("😀", 2), ("\uff57\uff45\uff42", 6), ("", 0)],
)
def test_a_name_is_as_wide_as_it_looks(text: str, width: int) -> None:
    assert measure_width(text) == width


def test_what_is_too_wide_is_cut_and_says_so() -> None:
    assert fit("web", 5) == "web  "
    assert fit("web", 5, right=True) == "  web"
    assert fit("database", 5) == "data…"
    assert fit("日本語", 5) == "日本…"
    assert fit("日本語", 4) == "日… "
    assert fit("database", 1) == "…"
    assert fit("database", 0) == ""


@given(st.text(), st.integers(0, 50))
def test_every_name_fits_exactly_and_drives_no_terminal(name: str, width: int) -> None:
    shown = fit(clean_name(name), width)
    assert measure_width(shown) == width
    assert shown.isprintable()
    assert measure_width(cut(clean_name(name), width)) <= width


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        *((0, "0"), (0.0001, "<0.1"), (0.05, "0.1"), (3, "3"), (3.25, "3.2"), (99.96, "100.0"), (999.6, "1,000")),
        *((12_345.6, "12,346"), (999_999, "999,999"), (1e6, "1.00M"), (1.844e19, "1.8e+19"), (2.5e15, "2.50P")),
        (-3, "-3"),
    ],
)
def test_numbers_are_short(amount: float, text: str) -> None:
    assert render_quantity(amount) == text


@given(st.floats(min_value=0, max_value=2**64))
def test_only_zero_is_zero_and_none_is_too_wide(amount: float) -> None:
    text = render_quantity(amount)
    assert (text == "0") is (amount == 0)
    assert len(text) <= 8


def test_time_per_time_is_per_cent_and_unknown_a_dash() -> None:
    assert render_amount(0.25, BLOCKED) == "25%"
    assert render_amount(None, BLOCKED) == "-"
    assert render_amount(0.0, HALTS) == "0"
    assert render_amount(3.5, PAGES) == "3.5"


def test_values_are_whole_and_have_their_unit() -> None:
    memory = StatDescriptor(StatScope.VM, "memory", StatKind.INSTANT, StatUnit.BYTES, 2, 12)
    assert memory.scale == Fraction(4096)
    assert render_value(2**64 - 1, HALTS) == "18,446,744,073,709,551,615"
    assert render_value(1_500_000_000, BLOCKED) == "1.500 s"
    assert render_value(3, memory) == "12,288 B"
    assert render_value(None, memory) == "-"
