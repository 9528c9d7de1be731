"""Marks over the graphs: stalls, and hosts that have changed."""

from __future__ import annotations

from exporter.prometheus import metrics as m
from grafana.builder.colors import BAD, OTHER
from grafana.builder.layout import DATASOURCE, Json
from grafana.builder.queries import select


def stall_annotation(expr: str, title: str, text: str) -> Json:
    """Return marks over the graphs for as long as ``expr`` gives a series."""
    return _annotation("Stalls", BAD, expr, title, text)


def change_annotation() -> Json:
    """Return marks where a host has come back with another microcode or kernel.

    Known for a day: a host that was away for longer is marked as little as a new one.
    """
    labels = "instance, microcode, kernel"
    before = f"last_over_time({select(m.HOST_INFO)}[1d] offset $__rate_interval)"
    return _annotation(
        "Microcode or kernel changed",
        OTHER,
        f"max by ({labels}) ({select(m.HOST_INFO)}) unless on ({labels}) {before} and on (instance) {before}",
        "{{instance}}: microcode {{microcode}}, kernel {{kernel}}",
        "The host has had these since here. The mark ends one rate interval later.",
    )


def _annotation(name: str, color: str, expr: str, title: str, text: str) -> Json:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": expr,
        "hide": False,
        "iconColor": color,
        "name": name,
        "step": "",
        "tagKeys": "instance",
        "textFormat": text,
        "titleFormat": title,
    }
