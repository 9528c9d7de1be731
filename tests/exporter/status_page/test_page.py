"""The page at ``/``: what it says, that it is self-contained, and that foreign text stays text."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from exporter.history.rates import RateHistory
from exporter.stalls.verdicts import Evidence, MonitorReport, State, VcpuReport, Verdict
from exporter.status_page.headline import Level, make_headline
from exporter.status_page.page import Frame, make_title, render_page, render_parts
from exporter.status_page.text import render_duration, render_time
from exporter.status_page.view import MAX_QUERY, SHOWN_ROWS, StatusView, clean_query, make_status_view
from exporter.web.status_handlers import make_headers
from kvm.model import NOTIFY_WINDOW_EXITS, Protection, Snapshot, SourceReport, VmCounters
from kvm.simulated.host import SimulatedHost
from tests.reports import make_report
from tests.snapshots import HIDDEN, make_snapshot, make_unread
from tests.status_hosts import HOSTILE_NAMES, make_large_host, make_reports, make_vm_reading

FRAME = Frame("0.1.0", "abc123", "hv-17", {"Metrics": "/metrics"})
NOW, UNIX = 100.0, 1.7e9
VOID = {"meta", "input", "br", "img", "link", "hr"}


def plain(text: str) -> str:
    """Text without the marks that isolate names in it."""
    return text.replace("\u2068", "").replace("\u2069", "")


class Outline(HTMLParser):
    """The tags, attributes and texts of a page; a tag that is not closed, or closed twice, fails the test."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID and tag != "path":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += plain(data)


def draw(snapshot: Snapshot | None, *vcpus: VcpuReport, problem: str = "", trigger: str = "bpf") -> StatusView:
    report = MonitorReport(vcpus=vcpus, problem=problem, trigger=trigger)
    return make_status_view(snapshot, report, RateHistory(), NOW, UNIX)


def render(picture: StatusView, query: str = "", with_details: bool = True, refresh: bool = False) -> str:
    return render_page(FRAME, picture, picture.find(query, with_details), with_details, refresh)


def test_it_says_what_is_the_matter_and_with_whom() -> None:
    reading = make_vm_reading("web", 1)
    page = render(draw(make_snapshot(reading), *make_reports([reading], State.STALLED, now=NOW)))
    text = Outline(page).text
    for expected in (
        "1 vCPU makes no forward progress: vCPU 0 of web.",
        "hv-17",
        "owner-of-web",
        "0xffffffff81012345",
        "registers unchanged",
        "lockdown forbids",
        "nothing to do",
        "Linux 6.12.48",
        "microcode 0x2b000620",
        "armed",
        "integrity (usual with Secure Boot)",
        "Version 0.1.0, revision abc123",
        "A BPF trigger on handle_notify()",
    ):
        assert expected in text
    assert '<time datetime="2023-11-14T22:13:14Z">22:13:14</time></span> <span class="soft">for 6 s' in page
    assert "<title>1 stalled · KVM notify exits · hv-17</title>" in page


@pytest.mark.parametrize(
    ("problem", "words"),
    [("no libbpf.so.1; install libbpf1", "no libbpf.so.1; install libbpf1."), ("", "none is asked for.")],
)
def test_it_says_why_counters_are_polled(problem: str, words: str) -> None:
    report = MonitorReport(trigger="poll", poll_period_seconds=1.0, trigger_problem=problem)
    page = render(make_status_view(make_snapshot(make_vm_reading("web", 1)), report, RateHistory(), NOW, UNIX))
    assert f"polled every 1 s, for want of a BPF trigger: {words}" in Outline(page).text


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (MonitorReport(trigger="poll"), "A trace of a vCPU's exits, for moments, tells where its notify exits are."),
        (MonitorReport(trigger="poll", evidence=Evidence.KERNEL), "KVM itself tells where each notify exit is"),
        (MonitorReport(trigger="poll", problem="refused"), "Nothing tells where notify exits are."),
        (None, "Nothing tells where notify exits are."),
    ],
)
def test_it_says_what_tells_where_notify_exits_are(report: MonitorReport | None, words: str) -> None:
    page = render(make_status_view(make_snapshot(make_vm_reading("web", 1)), report, RateHistory(), NOW, UNIX))
    assert words in Outline(page).text


def test_a_nested_guests_rip_is_certain_where_kvm_tells_it() -> None:
    for evidence, words in ((Evidence.TRACE, "the RIP may be"), (Evidence.KERNEL, "the RIP is")):
        report = MonitorReport(vcpus=(make_report(nested=True, evidence=evidence),), trigger="poll")
        page = render(make_status_view(make_snapshot(), report, RateHistory(), NOW, UNIX))
        assert f"{words} that of a nested guest" in Outline(page).text


def test_it_says_that_the_trigger_does_not_tell_of_all() -> None:
    report = MonitorReport(trigger="bpf", poll_period_seconds=1.0, trigger_missed=1)
    page = render(make_status_view(make_snapshot(make_vm_reading("web", 1)), report, RateHistory(), NOW, UNIX))
    assert "does not tell of all notify exits here, so counters are polled every 1 s too." in Outline(page).text


def test_strangers_see_neither_names_nor_owners_nor_rips() -> None:
    readings = [make_vm_reading("secret", 1), make_vm_reading("secret-2", 2, (0, 0))]
    picture = draw(make_snapshot(*readings), *make_reports(readings[:1], State.STALLED))
    for query in ("", "uuid", "secret"):
        parts = render_parts(FRAME, picture, picture.find(query, False), False)
        assert not re.search("secret|terces|0xffffffff81012345", parts)
        assert "vCPU 0 of uuid-1." in plain(parts)
        assert "only to clients that the agent knows" in parts
    assert "only to clients that the agent knows" not in render(picture)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("with_details", [True, False])
def test_foreign_text_is_text_wherever_it_is_shown(name: str, with_details: bool) -> None:
    frame = replace(FRAME, host_name=name)
    reading = make_vm_reading(name, 1, vm_id=name)
    snapshot = make_snapshot(reading, sources=(SourceReport("stats_fd", True), SourceReport(name, False, name, name)))
    drill = replace(make_report(State.STALLED, vm=reading.vm), drill=True)
    pictures = [draw(snapshot, *make_reports([reading], state, now=NOW)) for state in (State.STALLED, State.SUSPECT)]
    evidence = replace(make_report(State.PROGRESSING, vm=reading.vm, reason=name), deferred_reason=name)
    pictures += [draw(snapshot, drill), draw(snapshot, evidence), draw(snapshot, problem=name)]
    unread = replace(reading, counters=VmCounters(problem=name))
    pictures += [draw(make_snapshot(unread, make_vm_reading("a", 2, (0,)))), draw(None, problem=name)]
    polled = MonitorReport(trigger="poll", trigger_problem=name)
    pictures.append(make_status_view(make_snapshot(reading), polled, RateHistory(), NOW, UNIX))
    for picture in pictures:
        found = picture.find(clean_query(name), with_details)
        page = render_page(frame, picture, found, with_details)
        outline = Outline(page)
        assert outline.tags.count("script") == outline.tags.count("style") == outline.tags.count("title") == 1
        assert not {"img", "b"} & set(outline.tags)
        assert outline.tags.count("svg") == page.count('<svg class="plot"')
        assert not [attribute for _tag, attribute, _value in outline.attributes if attribute.startswith("on")]
        assert not re.search("[\0\a\x1b\u202e\u2028\udcff]", page)
        assert "w" * 501 not in page
        assert "\u0335\u0322\u0327" * 2 not in re.sub('value="[^"]*"', "", page)
        assert "<b>" not in outline.text  # nothing is taken for a character reference


@pytest.mark.parametrize("with_details", [True, False])
def test_foreign_text_is_text(with_details: bool) -> None:
    readings = [make_vm_reading(name, pid, vm_id=f"{name}{pid}") for pid, name in enumerate(HOSTILE_NAMES, 1)]
    evil = HOSTILE_NAMES[0]
    unread = replace(make_unread(problem=evil), vm=replace(make_unread().vm, id=evil))
    snapshot = make_snapshot(*readings, unread, sources=(SourceReport(evil, False, evil, evil),))
    picture = draw(snapshot, *make_reports(readings, State.STALLED, now=NOW), problem=evil)
    for query in ("", evil, "\udcff\0\u202e\"'><b>"):
        page = render(picture, clean_query(query), with_details)
        page.encode(errors="replace")
        outline = Outline(page)
        assert outline.tags.count("script") == outline.tags.count("style") == 1
        assert not {"img", "b"} & set(outline.tags)
        assert not [name for _tag, name, _value in outline.attributes if name.startswith("on") or name == "style"]
        assert not re.search("[\0\a\x1b\u202e\u2028\udcff]", page)
    page = render(picture, "", with_details)
    assert "<bdi>&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "invoice\\u202egnp.exe" in page
    assert "w" * 121 not in page


def test_a_query_is_cut_and_made_harmless() -> None:
    assert clean_query("  a\0b\u202e  c\udcff ") == "a b c"
    assert len(clean_query("x" * 10_000)) == MAX_QUERY
    assert clean_query("e " * 45 + "a b c d e f g h i") == "e a b c d f g h"


def test_a_name_in_a_sentence_turns_nothing_around() -> None:
    reading = make_vm_reading("שרת", 1)
    headline = make_headline(draw(make_snapshot(reading), *make_reports([reading], State.STALLED)), True)
    assert "vCPU 0 of \u2068שרת\u2069." in headline.text


def test_nothing_may_load_or_run_but_its_own_style_sheet_and_script() -> None:
    page = render(draw(make_snapshot(make_vm_reading("web", 1))))
    policy = make_headers()["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    for directive in ("connect-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"):
        assert directive in policy
    assert not re.search(r"url\(|@import|style=|src=|innerHTML|eval\(", page)
    assert re.findall(r"https?://[\w.:]+", page) == []


def test_the_parts_that_change_are_those_of_the_page() -> None:
    reading = make_vm_reading("web", 1)
    picture = draw(make_snapshot(reading), *make_reports([reading], State.SUSPECT))
    found = picture.find("", True)
    page, parts = render_page(FRAME, picture, found, True), render_parts(FRAME, picture, found, True)
    ids = re.findall(r'<div id="(\w+)" data-live', parts)
    assert ids == ["head", "rows", "rest"]
    assert all(part in page for part in re.split(r'(?=<div id="\w+" data-live)', parts))


def test_simulated_and_drills_are_marked() -> None:
    drill = replace(make_report(State.STALLED, since=NOW - 1, stuck_since_seconds=NOW - 2), drill=True)
    picture = draw(SimulatedHost(lambda: NOW, lambda: UNIX).read(), drill)
    outline = Outline(render(picture))
    assert "SIMULATED, not real: this is a simulated host." in outline.text
    assert "Drill, not real: vCPU 0 of web is said to be stuck and is well." in outline.text
    assert '<span class="tag">drill, not real</span>' in render(picture)
    assert make_title(FRAME, picture) == "Drill · KVM notify exits · hv-17"
    assert make_headline(picture, True).level is Level.CALM


ARMED, OFF = make_vm_reading("a", 1, (0,)), replace(make_vm_reading("b", 2, (0,)), protection=Protection.OFF)
UNKNOWN = replace(make_vm_reading("c", 3, (0,)), protection=Protection.UNKNOWN)
UNABLE = replace(make_vm_reading("d", 4, (0,)), protection=Protection.UNSUPPORTED)
ARMED_TOO = make_vm_reading("e", 5, (0,))


@pytest.mark.parametrize(
    ("readings", "meaning", "level"),
    [
        ([], "There is no VM.", Level.NEUTRAL),
        ([ARMED], "The VM has notify exits armed: it has opened no event window for too long.", Level.CALM),
        ([ARMED, ARMED_TOO], "All VMs have notify exits armed: none has opened no event window", Level.CALM),
        ([ARMED, OFF], "1 VM has notify exits armed; for the other one a 0 means less", Level.CALM),
        ([ARMED, OFF, UNKNOWN], "1 VM has notify exits armed; for the others a 0 means less", Level.CALM),
        ([OFF], "The VM can take none: its counter stays 0; see below.", Level.NEUTRAL),
        ([OFF, UNABLE], "The VMs can take none: their counters stay 0; see below.", Level.NEUTRAL),
        ([UNKNOWN, OFF], "a 0 does not mean that all is well", Level.NEUTRAL),
    ],
)
def test_where_none_was_taken_it_says_what_that_means(readings: list[object], meaning: str, level: Level) -> None:
    snapshot = make_snapshot(*readings)  # type: ignore[arg-type]
    headline = make_headline(draw(snapshot), True)
    assert headline.text == "No vCPU of this host has taken a notify exit."
    assert meaning in headline.meaning
    assert headline.level is level
    assert f'class="headline is-{level}"' in render(draw(snapshot))


def test_headlines_by_what_matters() -> None:
    reading = make_vm_reading("web", 1)
    snapshot = make_snapshot(reading)

    def tell(*states: State, snapshot: Snapshot | None = snapshot, problem: str = "") -> str:
        readings = [make_vm_reading(f"web-{pid}", pid) for pid in range(len(states))]
        reports = make_reports(readings, *(states or (State.QUIET,)))
        return plain(make_headline(draw(snapshot, *reports, problem=problem), True).text)

    # In an order of their own, so that it is not read out again when their rates change.
    text = "5 vCPUs make no forward progress: vCPU 0 of web-0, vCPU 0 of web-1, vCPU 0 of web-2"
    assert tell(*[State.STALLED] * 5).startswith(text)
    assert "and 2 more." in tell(*[State.STALLED] * 5)
    lost = tell(State.STALLED, State.CONTEXT_LOST)
    assert lost == "The CPU has lost the state of 1 vCPU: vCPU 0 of web-1."
    assert tell(State.SUSPECT, State.QUIET) == "1 vCPU may be stuck: vCPU 0 of web-0."
    assert tell(State.UNKNOWN).startswith("1 vCPU was stuck and cannot be judged now")
    assert tell(State.PROGRESSING).startswith("No vCPU is stuck. 2 vCPUs have taken notify exits.")
    assert "Whether one is stuck is not known." in tell(problem="no tracefs")
    assert tell(snapshot=None) == "The host has not been read yet."
    assert tell(snapshot=make_snapshot(reading, sources=())) == "The counters of this host cannot be read."
    incomplete = make_snapshot(reading, blind_spots=HIDDEN)
    assert tell(snapshot=incomplete) == "There may be VMs on this host that are not seen."
    assert "There may be VMs that are not listed: /proc hides process 1." in render(draw(incomplete))
    assert "Not every process" not in render(draw(snapshot))
    nobody = make_status_view(snapshot, None, RateHistory(), NOW, UNIX)
    assert make_headline(nobody, True).meaning == "This agent does not detect stalls."


def tell_one(snapshot: Snapshot, *vcpus: VcpuReport, trigger: str = "bpf") -> tuple[Level, str, str]:
    headline = make_headline(draw(snapshot, *vcpus, trigger=trigger), True)
    return headline.level, headline.text, headline.meaning


def test_what_nobody_can_judge_is_not_called_calm() -> None:
    reading = make_vm_reading("web", 1)
    snapshot = make_snapshot(reading)
    (report,) = make_reports([reading], State.NOTIFYING)
    one = (Level.WARN, "1 vCPU has taken notify exits. Of 1 vCPU it is not known whether it is stuck.")
    hidden = replace(report, verdict=Verdict(State.UNKNOWN, 90.0, reason="KVM hides its RIP"), can_judge=False)
    without_thread = replace(report, vcpu=replace(report.vcpu, tid=None), can_judge=False)
    sums = VmCounters(totals={NOTIFY_WINDOW_EXITS: 12})
    sum_only = replace(reading, vcpus=(), counters=sums)
    assert tell_one(snapshot, hidden)[:2] == one
    assert tell_one(snapshot, without_thread)[:2] == one
    assert tell_one(snapshot, trigger="")[:2] == one
    assert "its thread is not known" in render(draw(snapshot, without_thread))
    sum_text = "1 VM has taken notify exits. Of 1 VM it is not known whether it is stuck."
    assert tell_one(make_snapshot(sum_only)) == (Level.WARN, sum_text, "Why is said in its row.")
    assert "<dd>0 + 1 VM</dd>" in render(draw(make_snapshot(sum_only)))
    other = replace(make_vm_reading("db", 2), vcpus=(), counters=sums)
    level, text, _meaning = tell_one(make_snapshot(sum_only, other, make_vm_reading("c", 3)), trigger="")
    assert (level, text.split(". ")[1]) == (
        Level.WARN,
        "Of 1 vCPU and 2 VMs it is not known whether they are stuck.",
    )


def test_calm_is_said_of_what_is_known_and_of_no_more() -> None:
    reading, quiet, unread = make_vm_reading("web", 1), make_vm_reading("db", 2, (0, 0)), make_unread()
    (going,) = make_reports([reading], State.PROGRESSING)
    (new,) = make_reports([reading], State.NOTIFYING)
    level, text, meaning = tell_one(make_snapshot(reading), going)
    assert (level, text) == (Level.CALM, "No vCPU is stuck. 1 vCPU has taken notify exits.")
    assert meaning.startswith("Its guest goes on")
    _level, text, meaning = tell_one(make_snapshot(reading), new)
    assert (text.split(". ")[0], meaning) == ("No vCPU is known to be stuck", "1 vCPU has yet to be judged.")
    # A vCPU whose counter stands still is not stuck, whatever else is not known of it.
    (still,) = make_reports([reading], State.QUIET)
    assert tell_one(make_snapshot(reading), replace(still, can_judge=False))[0] is Level.CALM
    text = "No vCPU that was read is stuck. 1 vCPU has taken notify exits, of those that were read."
    assert tell_one(make_snapshot(reading, unread), going)[1] == text
    level, text, meaning = tell_one(make_snapshot(quiet, unread))
    assert (level, text) == (Level.WARN, "No vCPU that was read has taken a notify exit.")
    assert meaning.startswith("Some vCPUs cannot be read: nothing is known of them.")


def test_an_old_look_is_spoken_of_and_not_calm() -> None:
    picture = draw(make_snapshot(ARMED))
    assert make_headline(picture, True).level is Level.CALM
    assert "The newest snapshot is" not in render(replace(picture, now=NOW + 9))
    old = replace(picture, now=NOW + 40)
    assert "The newest snapshot is 40 s old" in Outline(render(old)).text
    headline = make_headline(old, True)
    assert headline.level is Level.WARN
    assert headline.meaning.startswith("What is known is 40 s old. ")
    assert headline.text == make_headline(picture, True).text  # which is not read out each second


def test_what_is_not_known_is_a_dash() -> None:
    reading = make_vm_reading("web", 1)
    (report,) = make_reports([reading], State.PROGRESSING)
    page = render(draw(make_snapshot(make_unread()), replace(report, notify_exits=None)))
    assert 'data-label="Notify exits" class="number">—</td>' in page
    assert page.count("<dd>—</dd>") == 0
    assert render(draw(None)).count("<dd>—</dd>") == 4
    assert "<dt>stalled now</dt><dd>—</dd>" in render(draw(make_snapshot(reading), problem="no tracefs"))


def test_search_says_what_it_found() -> None:
    picture = draw(make_large_host(10, 16, 1))
    assert f"{SHOWN_ROWS} of 160 shown, worst first; search to narrow down." in render(picture)
    assert "16 of 160 vCPUs with notify exits match." in render(picture, "web-3")
    assert "the first 50 are shown" in render(picture, "web")
    assert "Nothing matches" in render(picture, "nothing")
    quiet = draw(make_snapshot(make_vm_reading("web", 1, (0, 0))))
    assert "VMs that match and have taken none" in Outline(render(quiet, "web")).text
    assert "0 notify exits" in Outline(render(quiet, "web")).text


def test_without_javascript_it_can_be_searched_and_refreshed() -> None:
    picture = draw(make_snapshot(make_vm_reading("web", 1)))
    page = render(picture, 'a"&b', refresh=True)
    assert '<form role="search" action="." method="get">' in page
    assert 'value="a&quot;&amp;b"' in page
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in page
    assert '<a href="?q=a%22%26b">Stop refreshing</a>' in page
    assert '<a href="?q=x&amp;refresh=1">Refresh every 10 s</a>' in render(picture, "x")
    assert "http-equiv" not in render(picture)


def test_it_can_be_read_out() -> None:
    reading = make_vm_reading("web", 1)
    page = render(draw(make_snapshot(reading), *make_reports([reading], State.STALLED)))
    outline = Outline(page)
    assert {"header", "main", "footer", "nav", "h1"} <= set(outline.tags)
    assert outline.tags.count("table") == outline.tags.count("caption")
    assert ("html", "lang", "en") in outline.attributes
    assert ("div", "role", "status") in outline.attributes
    assert '<p class="count" id="count" role="status"></p>' in page  # there before there is something to tell
    assert ("label", "for", "q") in outline.attributes
    assert all(("th", "scope", scope) in outline.attributes for scope in ("row", "col"))
    ids = [value for _tag, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value for _tag, name, value in outline.attributes if name in ("aria-labelledby", "aria-describedby")]
    assert set(named) <= set(ids)


def test_ten_thousand_vcpus_cost_little_more_than_their_rows(tell: Callable[[str], None]) -> None:
    small, large = make_large_host(4, 16, 3), make_large_host(625, 16, 3)

    def measure(snapshot: Snapshot) -> tuple[float, float, float, int]:
        history = RateHistory()
        for seconds in (90.0, 95.0, 100.0):
            history.observe(replace(snapshot, monotonic_seconds=seconds))
        report = MonitorReport(vcpus=make_reports(snapshot.readings, State.NOTIFYING), trigger="bpf")
        best = [float("inf")] * 3
        for _ in range(5):
            times = [time.process_time()]
            picture = make_status_view(snapshot, report, history, NOW, UNIX)
            times.append(time.process_time())
            page = render(picture)
            times.append(time.process_time())
            picture.find("web-62", True)
            times.append(time.process_time())
            best = [min(old, after - before) for old, before, after in zip(best, times, times[1:], strict=False)]
        return best[0], best[1], best[2], len(page)

    few, many = measure(small), measure(large)
    tell(
        f"status page, 10,000 vCPUs with notify exits: put together {many[0] * 1e3:.0f} ms once for all, page "
        f"{many[1] * 1e3:.0f} ms, search {many[2] * 1e3:.0f} ms of CPU; {many[3]:,} bytes ({few[3]:,} with 64 vCPUs)"
    )
    assert many[3] < 1.2 * few[3]
    assert many[1] < 20 * few[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (72, "1 min 12 s"),
        (3600, "1 h"),
        (3725, "1 h 2 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


def test_times_of_another_day_have_a_date() -> None:
    assert render_time(1.7e9, 1.7e9 + 60) == "22:13:20"
    assert render_time(1.7e9, 1.7e9 + 86_400) == "2023-11-14 22:13:20"
