"""The page at ``/``: what this is, where the metrics are, and which sources work.

One document without scripts, images or foreign assets. Every text is escaped, whoever wrote it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from kvm.model import SourceReport

TITLE: Final = "KVM notify exporter"
DESCRIPTION: Final = "Notify VM exits of KVM guests, per vCPU, for Prometheus."

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #c4320a; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff8f6b; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } a { color: LinkText; }
table { border-collapse: collapse; width: 100%; } ul { margin: 0; padding-left: 1.2rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; } th { font-weight: 600; background: var(--soft); }
code { font: .9em ui-monospace, monospace; } footer { margin-top: 2.5rem; opacity: .7; font-size: .9rem; }
.up { color: var(--good); } .down { color: var(--bad); } .up, .down { font-weight: 600; white-space: nowrap; }
"""

_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What the page is to be sent with: nothing in it may load or run but its own style sheet."""


def render_page(version: str, revision: str, links: Mapping[str, str], sources: Sequence[SourceReport]) -> str:
    """Render the page; ``links`` are paths by what they lead to, ``sources`` empty before the first look."""
    items = "".join(f'<li><a href="{escape(path)}">{escape(title)}</a></li>' for title, path in links.items())
    release = f"Version {version or 'unknown'}" + (f", revision {revision}" if revision else "")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{TITLE}</h1><p>{DESCRIPTION}</p></header>"
        f"<main><h2>Pages</h2><ul>{items}</ul><h2>Sources of the counters</h2>{_render_sources(sources)}</main>"
        f"<footer>{escape(release)}</footer></body></html>\n"
    )


def _render_sources(sources: Sequence[SourceReport]) -> str:
    if not sources:
        return "<p>The host has not been looked at yet.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(report.source)}</code></td>"
        f'<td class="{"up" if report.up else "down"}">{"works" if report.up else "does not work"}</td>'
        f"<td>{escape(report.reason)}</td><td>{escape(report.remedy)}</td></tr>"
        for report in sources
    )
    return f"<table><tr><th>Source</th><th>State</th><th>Why</th><th>What to do</th></tr>{rows}</table>"
