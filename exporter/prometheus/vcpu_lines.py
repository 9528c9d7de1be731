"""The lines of one metric for the vCPUs of one VM, kept one by one.

Of the vCPUs that have ever taken a notify exit, some take one from scrape to scrape. Only their lines are printed anew:
the others are the same bytes as before. Some lines in a row make a block, so that few of the old ones need to be
touched: they lie all over the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import compress
from operator import ne
from typing import Final

from exporter.prometheus.exposition import render_number
from exporter.prometheus.metrics import Metric

BLOCK: Final = 32


class VcpuLines:
    """One line of each vCPU, in their order; a vCPU without a value has none."""

    __slots__ = ("_blocks", "_changed", "_labels", "_lines", "_name", "_values")

    def __init__(self, metric: Metric, labels: Sequence[bytes]) -> None:
        """``labels`` are those of each vCPU, rendered."""
        self._name, self._labels = metric.name.encode(), labels
        self._values: list[float | None] = [None] * len(labels)
        self._lines = [b""] * len(labels)
        self._blocks = [b""] * -(-len(labels) // BLOCK)
        self._changed: set[int] = set()

    def put(self, values: Sequence[float | None]) -> None:
        """Give each vCPU its value."""
        changed: Iterable[int] = compress(range(len(values)), map(ne, values, self._values))
        for at in changed:
            value = values[at]
            self._lines[at] = b"" if value is None else self._render(at, value)
            self._changed.add(at // BLOCK)
            self._values[at] = value  # last: what fails half way is done again

    def _render(self, at: int, value: float) -> bytes:
        return b"%b%b %b\n" % (self._name, self._labels[at], _render_value(value))

    def render(self) -> list[bytes]:
        """Return all lines, in blocks."""
        for block in self._changed:
            self._blocks[block] = b"".join(self._lines[block * BLOCK : (block + 1) * BLOCK])
        self._changed.clear()
        return [block for block in self._blocks if block]


@lru_cache(maxsize=64, typed=True)
def _render_value(value: float) -> bytes:
    """Render a number; many vCPUs share one, as the time of the snapshot in which they were seen to move."""
    return render_number(value).encode()
