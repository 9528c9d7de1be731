"""The lines of many VMs, metric by metric, as a document has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from exporter.prometheus.exposition import Family
from exporter.prometheus.metrics import Metric

Rendered = Mapping[Metric, Sequence[bytes]]
"""Lines of any number of metrics, any number to a text."""


def group_lines(rendered: Iterable[Rendered]) -> list[Family]:
    """Put the lines of all VMs together, metric by metric."""
    chunks: defaultdict[Metric, list[bytes]] = defaultdict(list)
    for lines in rendered:
        for metric, texts in lines.items():
            chunks[metric] += texts
    return [Family(metric, texts) for metric, texts in chunks.items()]


class GroupedLines:
    """The lines of so many VMs, metric by metric, kept from scrape to scrape: few VMs give others than before."""

    def __init__(self, vms: int) -> None:
        self._rendered: list[Rendered] = [{}] * vms
        self._chunks: dict[Metric, list[Sequence[bytes]]] = {}
        """Of each metric, the lines of each VM."""
        self._families: dict[Metric, Family] = {}

    def put(self, at: int, rendered: Rendered) -> None:
        """Put the lines of one VM in the place of its old ones; what is the same object has not changed."""
        if rendered is self._rendered[at]:
            return
        self._rendered[at] = {}  # no object that is given: what fails half way is put again
        for metric in rendered:
            if metric not in self._chunks:
                self._chunks[metric] = [()] * len(self._rendered)
        for metric, chunks in self._chunks.items():
            texts = rendered.get(metric, ())
            if texts != chunks[at]:
                self._families.pop(metric, None)
                chunks[at] = texts
        self._rendered[at] = rendered

    def list_families(self) -> list[Family]:
        """Return the lines of all VMs; the family of a metric of which none has changed is the same object."""
        for metric, chunks in self._chunks.items():
            if metric not in self._families:
                self._families[metric] = Family(metric, [*chain.from_iterable(chunks)])
        families = [self._families[metric] for metric in self._chunks]
        return [family for family in families if family.chunks]
