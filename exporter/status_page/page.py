"""The page at ``/``: what this host is, which vCPUs take notify exits, and why what does not work does not.

One document that loads nothing from elsewhere: its style sheet and its script are inside it, and a Content-Security-
Policy allows these two by their hashes and nothing else. The three parts that change carry ``data-live``: the script
asks for them alone, and puts what is new into the page. They come from the same functions, so there is one renderer.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Final
from urllib.parse import urlencode

from exporter.host_summary import (
    NOTHING_TO_DO,
    SOURCE_USES,
    can_read,
    describe_blind_spots,
    describe_cpu,
    describe_kvm,
    describe_lockdown,
)
from exporter.stalls.verdicts import State
from exporter.status_page.headline import Level, make_headline
from exporter.status_page.table import join_rows, render_moment, render_rows, render_untrusted
from exporter.status_page.text import (
    MAX_REASON,
    ZERO_MEANS,
    count_things,
    describe_age,
    describe_drills,
    describe_evidence,
    describe_usage,
    describe_watch,
)
from exporter.status_page.view import MAX_QUERY, Found, StatusView
from exporter.untrusted_text import clean_name
from kvm.model import Host, SourceReport

TITLE: Final = "KVM notify exits"
REFRESH_SECONDS: Final = 10


@dataclass(frozen=True, slots=True)
class Frame:
    """What of the page stays the same: the agent's version, the host's name, and links by what they lead to."""

    version: str
    revision: str
    host_name: str
    links: Mapping[str, str]


@cache
def read_asset(name: str) -> str:
    """Return the style sheet or the script."""
    return files("exporter.status_page").joinpath(name).read_text(encoding="utf-8")


def render_page(frame: Frame, view: StatusView, found: Found, with_details: bool, refresh: bool = False) -> str:
    """Render the page; ``refresh`` lets browsers without JavaScript load it again by themselves."""
    # Without the script only: with it, the page keeps itself up to date.
    again = f'<noscript><meta http-equiv="refresh" content="{REFRESH_SECONDS}"></noscript>' * refresh
    head, rows, rest = _render_parts(frame, view, found, with_details)
    links = "".join(f'<li><a href="{escape(path)}">{escape(title)}</a></li>' for title, path in frame.links.items())
    release = f"Version {frame.version or 'unknown'}" + (f", revision {frame.revision}" if frame.revision else "")
    host = render_untrusted(frame.host_name) if frame.host_name else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(make_title(frame, view))}</title>{again}'
        f"<style>{read_asset('status.css')}</style></head><body>"
        '<a class="skip" href="#vcpus">To the vCPUs</a>'
        f'<header><h1>{TITLE} <span class="host">{host}</span></h1><div class="clock">'
        f'<p id="clock">As of {render_moment(view.unix, view.unix)} UTC</p>'
        '<button type="button" id="pause" aria-pressed="false" hidden>Pause</button>'
        f"{_render_refresh_link(found.query, refresh)}</div></header>"
        f'<p id="alarm" role="alert"></p><main>{head}'
        f'<section aria-labelledby="vcpus"><div class="bar"><h2 id="vcpus" tabindex="-1">vCPUs that have taken notify '
        f"exits</h2>{_render_search(found.query, refresh, with_details)}</div>{rows}</section>{rest}</main>"
        f'<footer><nav aria-label="Pages of the agent"><ul>{links}</ul></nav><p>kvm-notify-exporter. {escape(release)}.'
        f"</p></footer><script>{read_asset('status.js')}</script></body></html>\n"
    )


def render_parts(frame: Frame, view: StatusView, found: Found, with_details: bool) -> str:
    """Render what changes: the parts of the page that its script replaces."""
    return "".join(_render_parts(frame, view, found, with_details))


def make_title(frame: Frame, view: StatusView) -> str:
    """Return the title: what is the matter comes first, for whoever sees a row of tabs."""
    stalled = len(view.find_in(State.STALLED))
    drills = len(view.find_in(State.STALLED, drill=True))
    lost = len(view.find_in(State.CONTEXT_LOST))
    matter = (
        f"{lost:,} lost by the CPU · "
        if lost
        else f"{stalled:,} stalled · "
        if stalled
        else "Drill · "
        if drills
        else ""
    )
    return f"{matter}{TITLE}" + (f" · {clean_name(frame.host_name)}" if frame.host_name else "")


def _render_parts(frame: Frame, view: StatusView, found: Found, with_details: bool) -> tuple[str, str, str]:
    headline, drills = make_headline(view, with_details), describe_drills(view, with_details)
    notes = "".join(
        f'<p class="note">{escape(text)}</p>'
        for text in (drills, "SIMULATED, not real: this is a simulated host." * view.simulated, describe_age(view))
        if text
    )
    head = (
        f'<div id="head" data-live data-title="{escape(make_title(frame, view))}" data-page="{_name_assets()}">'
        f'{notes}<section class="headline is-{headline.level}" aria-labelledby="headline">'
        f'<div role="status"><h2 id="headline">{escape(headline.text)}</h2></div>'
        f"<p>{escape(headline.meaning)}</p></section>"
        f"{_render_figures(view)}</div>"
    )
    rows = f'<div id="rows" data-live>{render_rows(view, found, with_details)}{_render_hint(with_details)}</div>'
    about = f"{_render_protections(view)}{_render_sources(view)}{_render_host(view)}"
    return head, rows, f'<div id="rest" data-live>{about}</div>'


def _render_figures(view: StatusView) -> str:
    vms = len(view.snapshot.readings) if view.snapshot else None
    can_tell = view.report is not None and not view.report.problem
    figures = {
        "VMs": _number(vms),
        "vCPUs": _number(view.count_vcpus()),
        "with notify exits": _count_notified(view),
        "stalled now": _number(len(view.find_in(State.STALLED)) if can_tell else None),
        "watched": escape(describe_watch(view)[0]),
        "sources work": _count_sources(view),
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return f'<dl class="figures">{items}</dl>'


def _count_notified(view: StatusView) -> str:
    if view.snapshot is None:
        return _number(None)
    rows = view.find_real()
    vms = sum(row.vcpu is None for row in rows)  # of which only the sum is known
    return _number(len(rows) - vms) + f" + {count_things(vms, 'VM')}" * (vms > 0)


def _count_sources(view: StatusView) -> str:
    """Say how many sources work, and lead to which: their table stands below one that may be long."""
    sources = view.snapshot.sources if view.snapshot else ()
    if not sources:
        return _number(None)
    return f'<a href="#sources">{sum(source.up for source in sources)} of {len(sources)}</a>'


def _render_search(query: str, refresh: bool, with_details: bool) -> str:
    what = "VM, name, owner, RIP or state" if with_details else "VM or state"
    kept = '<input type="hidden" name="refresh" value="1">' * refresh
    return (
        f'<form role="search" action="." method="get"><label for="q">Search</label>'
        f'<input type="search" id="q" name="q" value="{escape(query)}" maxlength="{MAX_QUERY}" placeholder="{what}" '
        f'autocomplete="off" spellcheck="false" aria-describedby="count">{kept}<button>Find</button></form>'
    )


def _render_refresh_link(query: str, refresh: bool) -> str:
    words = ({"q": query} if query else {}) | ({} if refresh else {"refresh": "1"})
    text = "Stop refreshing" if refresh else f"Refresh every {REFRESH_SECONDS} s"
    return f'<noscript><a href="?{escape(urlencode(words))}">{text}</a></noscript>'


def _render_hint(with_details: bool) -> str:
    if with_details:
        return ""
    return (
        '<p class="soft">Names, owners and RIPs are shown only to clients that the agent knows: by a password, or by '
        "<code>ssh -L 9751:/run/kvm-notify-exporter/agent.sock root@HOST</code>, then http://localhost:9751/.</p>"
    )


def _render_protections(view: StatusView) -> str:
    counts = view.count_protections()
    if not counts:
        return ""
    rows = join_rows((state.value, count_things(count, "VM"), ZERO_MEANS[state]) for state, count in counts.items())
    return (
        '<section aria-labelledby="zero"><h2 id="zero">What a zero means here</h2><table class="plain">'
        '<caption>VMs by whether their notify exits are armed</caption><thead><tr><th scope="col">Notify exits</th>'
        f'<th scope="col">VMs</th><th scope="col">Their counter</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _render_sources(view: StatusView) -> str:
    sources = view.snapshot.sources if view.snapshot else ()
    if view.snapshot is None or not sources:
        return ""
    all_read = can_read(view.snapshot)
    rows = join_rows(
        (
            f"<code>{_render_text(source.source)}</code>",
            f'<span class="is-{_judge_source(source, all_read)}">{"works" if source.up else "does not work"}</span>',
            _render_text(source.reason or SOURCE_USES.get(source.source, "")),
            _render_text(source.remedy) or NOTHING_TO_DO * (not source.up),
        )
        for source in sources
    )
    return (
        '<section aria-labelledby="sources"><h2 id="sources" tabindex="-1">Sources of the counters</h2>'
        '<table class="plain"><caption>Ways to read counters, best first</caption><thead><tr>'
        '<th scope="col">Source</th><th scope="col">State</th>'
        '<th scope="col">What it gives, or why not</th><th scope="col">What to do</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></section>"
    )


def _judge_source(source: SourceReport, all_read: bool) -> Level:
    """Say how much it matters how a source is: nothing where nothing is to be done, most where counters are missing."""
    if source.up:
        return Level.CALM
    if not source.remedy:
        return Level.NEUTRAL
    return Level.WARN if all_read else Level.BAD


def _render_host(view: StatusView) -> str:
    if view.snapshot is None:
        return ""
    host = view.snapshot.host
    facts = {
        "Kernel": _render_text(f"Linux {host.kernel}"),
        "CPU": _render_text(describe_cpu(host)),
        "KVM": _render_text(describe_kvm(host)),
        "Notify exits": _render_text(_describe_support(host)),
        "Lockdown": _render_text(describe_lockdown(host)),
        "Stalls": escape(describe_watch(view)[1]),
        "Evidence": escape(describe_evidence(view)),
    }
    if view.report is not None and view.report.agent_usage is not None:
        facts["Agent"] = escape(describe_usage(view.report.agent_usage))
    if not view.snapshot.complete:
        facts["Beware"] = _render_text(f"There may be VMs that are not listed: {describe_blind_spots(view.snapshot)}.")
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<section aria-labelledby="host"><h2 id="host">This host</h2><dl class="facts">{items}</dl></section>'


def _describe_support(host: Host) -> str:
    if host.notify_supported is None:
        return f"unknown: {host.notify_unknown_reason or 'KVM cannot be asked'}"
    if host.notify_supported:
        return "supported; whether a VM has them armed is its VMM's choice"
    return "not supported by KVM on this host: every counter stays 0 (kvm-notify-exporter check says why)"


def _render_text(text: str) -> str:
    """Render what a source says, which may quote untrusted text."""
    return escape(clean_name(text, MAX_REASON))


def _number(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def hash_asset(text: str) -> str:
    """Hash a style sheet or script as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _name_assets() -> str:
    """Name the style sheet and the script, so that a page that was loaded from an older agent can tell."""
    return hashlib.sha256((read_asset("status.css") + read_asset("status.js")).encode()).hexdigest()[:16]
