"""The lines of many VMs, metric by metric, as a document has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from operator import is_not

from exporter.prometheus.exposition import Family
from exporter.prometheus.metrics import Metric

Rendered = list[tuple[Metric, bytes]]
"""Lines of any number of metrics, any number to a text."""


def group_lines(rendered: Iterable[Rendered]) -> list[Family]:
    """Put the lines of all VMs together, metric by metric."""
    chunks: defaultdict[Metric, list[bytes]] = defaultdict(list)
    for lines in rendered:
        for metric, text in lines:
            chunks[metric].append(text)
    return [Family(metric, texts) for metric, texts in chunks.items()]


class GroupedLines:
    """The lines of many VMs, metric by metric, kept from scrape to scrape: most VMs give the same list as before."""

    def __init__(self) -> None:
        self._rendered: list[Rendered] = []
        self._chunks: dict[Metric, list[Sequence[bytes]]] = {}
        """Of each metric, the lines of each VM, in the order of ``_rendered``."""
        self._families: dict[Metric, Family] = {}

    def group(self, rendered: list[Rendered]) -> list[Family]:
        """Put the lines of all VMs together; a list that is another object than before has changed."""
        if len(rendered) != len(self._rendered):
            self._rendered, self._chunks, self._families = [[] for _ in rendered], {}, {}
        changed = [*compress(range(len(rendered)), map(is_not, rendered, self._rendered))]
        for at in changed:
            self._rendered[at] = []  # no list that is given: what fails half way is put again
            self._put(at, rendered[at])
            self._rendered[at] = rendered[at]
        for metric, chunks in self._chunks.items():
            if metric not in self._families:
                self._families[metric] = Family(metric, [*chain.from_iterable(chunks)])
        families = [self._families[metric] for metric in self._chunks]
        return [family for family in families if family.chunks]

    def _put(self, at: int, lines: Rendered) -> None:
        of_metric: defaultdict[Metric, list[bytes]] = defaultdict(list)
        for metric, text in lines:
            of_metric[metric].append(text)
        for metric in of_metric:
            if metric not in self._chunks:
                self._chunks[metric] = [()] * len(self._rendered)
        for metric, chunks in self._chunks.items():
            texts = of_metric.get(metric, ())
            if texts != chunks[at]:
                self._families.pop(metric, None)
                chunks[at] = texts
