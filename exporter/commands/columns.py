"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from exporter.top.cells import fit, measure_width


def render_columns(
    header: Sequence[str], rows: Iterable[Sequence[object]], right: Collection[str] = frozenset()
) -> str:
    """Render rows under a header, columns aligned, those of ``right`` to the right; not printable shows as ``?``."""
    cells = [list(header), *([_make_printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(measure_width, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            fit(cell, width, right=name in right) for cell, width, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines) + "\n"


def _make_printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
