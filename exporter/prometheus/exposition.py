"""Metric families as text: our own fast path, held to prometheus_client's output by a test.

Sample lines are the same bytes in the text format 0.0.4 and in OpenMetrics 1.0.0; only the comments around them
differ. So a line is made once and kept: ``SampleLines`` holds the lines of one metric over fixed label sets as one
template, and a snapshot of 16 vCPUs then costs one ``%`` and not 16 dictionaries.

Measured on 10,000 vCPUs in 625 VMs (26,200 lines, 2.1 MB, every ``exits`` new in each snapshot; Python 3.11 on a shared
2-core machine): from snapshot to bytes 7 ms at best and 10 ms in the median, where prometheus_client takes 135 and
190 ms for the same families: 20 times as long.

Integers are printed as integers, exact to 2**64; prometheus_client's floats lose digits above 2**53.
"""

from __future__ import annotations

import gzip
import logging
import math
from collections.abc import Iterable, Sequence
from functools import cache

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.registry import CollectorRegistry

from exporter.prometheus.metrics import Metric
from exporter.prometheus.negotiation import Format

log = logging.getLogger(__name__)


# One lone surrogate (an undecodable byte of a VM's name) is not UTF-8, and Prometheus then refuses the whole scrape.
_LABEL_ESCAPES = str.maketrans(
    {"\\": r"\\", "\n": r"\n", '"': r"\""} | {chr(code): "\ufffd" for code in range(0xD800, 0xE000)}
)


class Family:
    """A metric and its sample lines; ``chunks`` are whole lines, rendered, any number to a chunk."""

    __slots__ = ("chunks", "metric")

    def __init__(self, metric: Metric, chunks: list[str] | None = None) -> None:
        self.metric = metric
        self.chunks: list[str] = [] if chunks is None else chunks

    def add(self, label_values: Sequence[str], value: float) -> None:
        """Append one sample, its label values in the order of ``metric.labels``."""
        self.chunks.append(render_sample(self.metric, label_values, value))

    def join(self) -> None:
        """Make one chunk of all: worth it for a family that is rendered again and again."""
        if len(self.chunks) > 1:
            self.chunks = ["".join(self.chunks)]


class SampleLines:
    """The sample lines of one metric over fixed label sets, with numbers that change from snapshot to snapshot."""

    __slots__ = ("_template", "_text", "_values")

    def __init__(self, metric: Metric, label_sets: Iterable[Sequence[str]]) -> None:
        series = (render_series(metric, label_values) for label_values in label_sets)
        self._template = "".join(f"{name.replace('%', '%%')} %d\n" for name in series)
        self._values: tuple[int, ...] = ()
        self._text = ""

    def render(self, values: tuple[int, ...]) -> str:
        """Render the lines with one integer for each label set; raises TypeError if there are more or fewer."""
        # Most vCPUs never take a notify exit: comparing is ten times cheaper than rendering the same zeros again.
        if values != self._values:
            self._text = self._template % values
            self._values = values
        return self._text


def escape_label_value(value: str) -> str:
    """Escape a label value of any origin; what cannot be UTF-8 (a lone surrogate) becomes U+FFFD."""
    return value.translate(_LABEL_ESCAPES)


def render_series(metric: Metric, label_values: Sequence[str]) -> str:
    """Render a sample line up to the number; raises ValueError if a label value is missing or one too many."""
    if not metric.labels and not label_values:
        return metric.name
    pairs = zip(metric.labels, label_values, strict=True)
    labels = ",".join(f'{name}="{escape_label_value(value)}"' for name, value in pairs)
    return f"{metric.name}{{{labels}}}"


def render_number(value: float) -> str:
    """Render a number as both formats spell it; an integer keeps all its digits."""
    if isinstance(value, int):
        return str(int(value))
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def render_sample(metric: Metric, label_values: Sequence[str], value: float) -> str:
    """Render one sample line."""
    return f"{render_series(metric, label_values)} {render_number(value)}\n"


@cache
def render_metadata(metric: Metric, openmetrics: bool) -> str:
    """Render the comment lines before a metric's samples."""
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    if not openmetrics:
        return f"# HELP {metric.name} {text}\n# TYPE {metric.name} {metric.type}\n"
    text = text.replace('"', r"\"")
    unit = f"# UNIT {metric.family} {metric.unit}\n" if metric.unit else ""
    return f"# HELP {metric.family} {text}\n# TYPE {metric.family} {metric.type}\n{unit}"


def render_text(families: Iterable[Family], openmetrics: bool = False) -> str:
    """Render families, those without samples left out; OpenMetrics still lacks its last line, ``# EOF``."""
    pieces: list[str] = []
    for family in families:
        if family.chunks:
            pieces.append(render_metadata(family.metric, openmetrics))
            pieces.extend(family.chunks)
    return "".join(pieces)


def render_document(families: Iterable[Family], self_metrics: CollectorRegistry, form: Format) -> bytes:
    """Render the whole answer to a scrape: our families, then what ``self_metrics`` holds, in one valid document."""
    ours = render_text(families, form.openmetrics).encode()
    try:
        theirs = form.encoder(self_metrics)
    except Exception as err:  # noqa: BLE001 - a fault in the agent's own figures must not cost the VMs' series
        log.error("the agent's own process metrics are left out", extra={"fields": {"err": repr(err)}})
        theirs = form.encoder(CollectorRegistry())
    return ours + theirs


def open_self_metrics(enabled: bool) -> CollectorRegistry:
    """Make a registry with the process_* and python_* metrics of this process, or with nothing in it."""
    registry = CollectorRegistry()
    if enabled:
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
    return registry


def compress_document(document: bytes) -> bytes:
    """Compress a document at gzip's fastest level: 4 ms for 2.1 MB, where the default takes 55 to save 28 % more."""
    return gzip.compress(document, compresslevel=1, mtime=0)
