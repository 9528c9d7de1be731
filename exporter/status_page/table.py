"""The rows of the status page as HTML: the vCPUs that have taken notify exits, and what a search found besides.

Whatever comes from a guest's owner passes through ``render_untrusted``: escaped, isolated, of bounded length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from typing import Final

from exporter.stalls.verdicts import State, render_rip
from exporter.status_page.sparkline import describe_rate, render_plot, render_rate
from exporter.status_page.text import count_things, list_evidence, render_duration, render_time
from exporter.status_page.view import Found, Row, StatusView
from exporter.untrusted_text import clean_name

# Told apart by shape and word as well as by colour.
_MARKS: Final = {
    State.CONTEXT_LOST: "✖",
    State.STALLED: "■",
    State.SUSPECT: "▲",
    State.UNKNOWN: "?",
    State.NOTIFYING: "●",
    State.PROGRESSING: "●",
    State.RECOVERED: "●",
    State.QUIET: "○",
}
_COLUMNS: Final = ("State", "VM", "vCPU", "Rate", "Last 5 minutes", "Notify exits", "Last one (UTC)", "Evidence")
_NO_PLOT: Final = '<span class="soft">a drill has none</span>'
_NUMBERS: Final = frozenset({"vCPU", "Rate", "Notify exits"})


def render_untrusted(text: str) -> str:
    """Render untrusted text: markup in it is text, and writing from right to left stays within."""
    return f"<bdi>{escape(clean_name(text))}</bdi>"


def render_moment(unix: float, now: float) -> str:
    """Render a time for people and for programs."""
    return f'<time datetime="{datetime.fromtimestamp(unix, UTC):%Y-%m-%dT%H:%M:%SZ}">{render_time(unix, now)}</time>'


def render_rows(view: StatusView, found: Found, with_details: bool) -> str:
    """Render the table, and a line that says how much of it there is."""
    pieces = [f'<p class="count" id="count" role="status">{escape(_count_rows(found))}</p>']
    if found.rows:
        head = "".join(
            f'<th scope="col" role="columnheader" data-label="{name}"{_classify(name)}>{name}</th>' for name in _COLUMNS
        )
        body = "".join(_render_row(view, row, with_details) for row in found.rows)
        pieces.append(
            '<table role="table" class="vcpus"><caption>vCPUs with notify exits, worst first</caption>'
            f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
        )
    if found.quiet:
        pieces.append(_render_quiet(found, with_details))
    return "".join(pieces)


def _count_rows(found: Found) -> str:
    """Say how many rows there are, and whether there are more."""
    if not found.query:
        if not found.all_rows:
            return "None: no vCPU that was read has taken a notify exit."
        if len(found.rows) == found.all_rows:
            return ""
        return f"{len(found.rows):,} of {found.all_rows:,} shown, worst first; search to narrow down."
    if not found.matching and not found.quiet:
        return f"Nothing matches; {count_things(found.all_rows, 'vCPU has', 'vCPUs have')} taken notify exits."
    if not found.matching:
        return "No vCPU with notify exits matches."
    match = "matches" if found.matching == 1 else "match"
    text = f"{found.matching:,} of {count_things(found.all_rows, 'vCPU')} with notify exits {match}"
    return f"{text}; the first {len(found.rows)} are shown." if len(found.rows) < found.matching else f"{text}."


def _render_row(view: StatusView, row: Row, with_details: bool) -> str:
    vcpu = "all" if row.vcpu is None else str(row.vcpu.index)
    cells = {
        "vCPU": vcpu,
        "Rate": f'<span aria-hidden="true">{render_rate(row.rate)}</span>'
        f'<span class="sr">{describe_rate(row.rate)}</span>',
        "Last 5 minutes": render_plot(row.steps, row.rate, view.now) if not row.drill else _NO_PLOT,
        "Notify exits": "—" if row.notify_exits is None else f"{row.notify_exits:,}",
        "Last one (UTC)": _render_last(view, row),
        "Evidence": _render_evidence(row, with_details),
    }
    rest = "".join(f'<td role="cell" data-label="{name}"{_classify(name)}>{cell}</td>' for name, cell in cells.items())
    return (
        f'<tr role="row" id="{_name_row(row)}" class="is-{row.state or "unknown"}">'
        f'<td role="cell" data-label="State">{_render_state(view, row)}</td>'
        f'<th scope="row" role="rowheader" data-label="VM">{_render_vm(row, with_details)}</th>{rest}</tr>'
    )


def _render_state(view: StatusView, row: Row) -> str:
    if row.state is None:
        return '<span class="state">not watched</span>'
    text = (
        f'<span class="state"><span aria-hidden="true">{_MARKS[row.state]}</span> {row.state.replace("_", " ")}</span>'
    )
    text += ' <span class="tag">drill, not real</span>' * row.drill
    since = row.report.verdict.stuck_since_seconds if row.report else None
    if since is not None and row.state in (State.CONTEXT_LOST, State.STALLED, State.SUSPECT, State.UNKNOWN):
        moment = render_moment(view.unix - view.now + since, view.unix)
        text += f' <span class="soft">since {moment}</span>'
        text += f' <span class="soft">for {render_duration(view.now - since)}</span>'
    return text


def _render_vm(row: Row, with_details: bool) -> str:
    owner, name = row.vm.owner, row.vm.owner.name if with_details else ""
    text = f'<span class="name">{render_untrusted(name or row.vm.id)}</span>'
    text += f'<span class="soft id">{render_untrusted(row.vm.id)}</span>' * (name not in ("", row.vm.id))
    about = []
    if with_details:
        about += [render_untrusted(word) for word in (owner.display_name, owner.project or owner.namespace) if word]
        about.append(f"{render_untrusted(owner.vmm)} {row.vm.key.pid}")
    if row.reading is not None:
        about.append(row.reading.protection.value)
    return f'{text}<span class="soft">{" · ".join(about)}</span>'


def _render_last(view: StatusView, row: Row) -> str:
    moved = row.report.moved_seconds if row.report else None
    if moved is not None:
        return render_moment(view.unix - view.now + moved, view.unix)
    return '<span class="soft">not seen</span>'


def _render_evidence(row: Row, with_details: bool) -> str:
    rip = row.report.verdict.rip if row.report and with_details else None
    place = "" if rip is None else f'<code class="rip">{render_rip(rip)}</code>'
    said = escape("; ".join(clean_name(text) for text in list_evidence(row)))
    return f'{place}<span class="soft">{said}</span>'


def _render_quiet(found: Found, with_details: bool) -> str:
    items = "".join(f"<li>{_render_vm(row, with_details)} {_render_quiet_count(row)}</li>" for row in found.quiet)
    more = found.quiet_matching - len(found.quiet)
    rest = f"<li>and {more:,} more</li>" if more else ""
    return f'<h3>VMs that match and have taken none</h3><ul class="quiet">{items}{rest}</ul>'


def _render_quiet_count(row: Row) -> str:
    if row.notify_exits is None:
        why = "; ".join(list_evidence(row)) or "no source could read it"
        return f'<span class="count">not read: {escape(clean_name(why))}</span>'
    return f'<span class="count">{count_things(row.notify_exits, "notify exit")}</span>'


def _name_row(row: Row) -> str:
    """Return a name by which a row is known again; it gives nothing away, and no untrusted text is in it."""
    text = repr((row.vm.id, row.vm.key, row.history_id, row.drill))
    return "r" + hashlib.blake2s(text.encode(errors="replace"), digest_size=8).hexdigest()


def _classify(name: str) -> str:
    return ' class="number"' if name in _NUMBERS else ""


def join_rows(cells: Iterable[Iterable[str]]) -> str:
    """Render the rows of a small table, the first cell of each its header; the cells are HTML."""
    rows = []
    for first, *rest in cells:
        rows.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    return "".join(rows)
