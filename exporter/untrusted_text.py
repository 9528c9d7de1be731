"""Untrusted text as a person may see it, on a page or in a terminal: names, reasons, what a process is called."""

from __future__ import annotations

import unicodedata
from typing import Final

MAX_NAME: Final = 120
# More marks than this upon one letter are no writing: they would cover the lines around it.
MAX_MARKS: Final = 4
# Letters by their category, and nothing to see: Hangul fillers, and Braille without a dot.
BLANK: Final = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def clean_name(text: str, limit: int = MAX_NAME) -> str:
    """Return untrusted text as it may be shown: what is invisible, or turns text around, is spelled out."""
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    cleaned, length, marks = [], 0, 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        is_fine = character.isprintable() and character not in BLANK and marks <= MAX_MARKS
        cleaned.append(character if is_fine else _spell(ord(character)))
        length += len(cleaned[-1])
        if length >= limit:
            break
    return "".join(cleaned) + "…" * (len(cleaned) < len(text))


def _spell(code: int) -> str:
    if 0xD800 <= code <= 0xDFFF:  # an undecodable byte
        return "�"
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
