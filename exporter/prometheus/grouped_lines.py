"""The lines of many VMs, metric by metric, as a document has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

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
