"""Writes the tables of ``docs/metrics.md`` from the table of metrics: ``python -m tests.metrics_document``.

What stands above the marker is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.prometheus.metrics import METRICS, Metric
from tests.documents import DOCS

PATH = DOCS / "metrics.md"
MARKER = "<!-- generated from here on -->\n"
SECTIONS = {
    "kvm_vcpu_": "Of a vCPU",
    "kvm_vm_": "Of a VM",
    "kvm_host_": "Of the host",
    "kvm_exporter_": "Of the agent",
}


def render_metric(metric: Metric) -> str:
    """Render a metric as a row; a ``|`` in its help would start another cell."""
    labels = " ".join(f"`{label}`" for label in metric.labels)
    text = metric.help.replace("|", "\\|")
    return f"| `{metric.name}` | {metric.type} | {labels} | {text} |"


def render_section(title: str, metrics: Sequence[Metric]) -> str:
    """Render the metrics about one kind of thing."""
    return "\n".join([f"## {title}", "", "| metric | type | labels | help |", "|---|---|---|---|"]) + "".join(
        f"\n{render_metric(metric)}" for metric in metrics
    )


def render_tables() -> str:
    """Render every metric, in the order of the exposition."""
    return "\n\n".join(
        render_section(title, [metric for metric in METRICS if metric.name.startswith(prefix)])
        for prefix, title in SECTIONS.items()
    )


def render_document(old: str) -> str:
    """Return the document with new tables; raises ValueError where it has no marker."""
    head, marker, _tables = old.partition(MARKER)
    if not marker:
        raise ValueError(f"{PATH} has no line {MARKER.strip()!r}")
    return f"{head}{marker}\n{render_tables()}\n"


def main() -> None:
    PATH.write_text(render_document(PATH.read_text()))
    print(PATH)


if __name__ == "__main__":
    main()
