"""Tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from exporter.top.cells import fit, measure_width
from exporter.untrusted_text import clean_name


def render_columns(
    header: Sequence[str], rows: Iterable[Sequence[object]], right: Collection[str] = frozenset()
) -> str:
    """Render rows of untrusted cells under a header, columns aligned, those of ``right`` to the right."""
    cells = [list(header), *([clean_name(str(cell), sys.maxsize) for cell in row] for row in rows)]
    widths = [max(map(measure_width, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            fit(cell, width, right=name in right) for cell, width, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines) + "\n"
