"""The status page in a real browser: Debian's Chromium."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from exporter.history.rates import RateHistory
from exporter.stalls.verdicts import MonitorReport, State
from exporter.status_page.page import Frame, render_page, render_parts
from exporter.status_page.view import make_status_view
from kvm.model import SourceReport
from kvm.simulated.host import CYCLE_SECONDS
from tests.agents import AgentProcess, open_known_agent
from tests.live import open_guest_process
from tests.live.chromium import Tab, find_chromium, open_tab
from tests.reports import make_report
from tests.snapshots import make_snapshot
from tests.status_hosts import (
    HOSTILE_NAMES,
    SCRIPT,
    FixedHost,
    FixedWatcher,
    ScriptedAgent,
    make_large_host,
    make_reports,
    make_vm_reading,
    serve_host,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="there is no chromium: Debian's package has it")

READINGS = [make_vm_reading(name, pid) for pid, name in enumerate(("web-1", "web-2", "batch-1"), 1)]
ROWS = "document.querySelectorAll('table.vcpus tbody tr').length"
HEADLINE = "document.getElementById('headline').textContent.replace(/[\\u2068\\u2069]/g, '')"
ALARM = "document.getElementById('alarm').textContent"
CLOCK = "document.getElementById('clock').textContent"
STALE = "document.documentElement.classList.contains('is-stale')"
# Counts answers that the page has taken in: the clock is written then.
COUNT_POLLS = """
    window.polls = 0;
    new MutationObserver(() => { window.polls += 1; }).observe(document.getElementById("clock"), {childList: true});
"""
# The worst contrast (WCAG 2.2, 1.4.3) of all text that is shown, as [ratio to what is wanted, text, colours].
MEASURE_CONTRAST = """(() => {
    const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const bright = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 :
        ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (element) => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
        return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    let worst = [99, "", ""], texts = 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, style = getComputedStyle(element);
        if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
        if (element.closest("script, style, .sr, .skip")) continue;
        const below = ground(element), ink = over(parse(style.color), below);
        const [light, dark] = [bright(ink), bright(below)].sort((a, b) => b - a);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const ratio = (light + 0.05) / (dark + 0.05) / (large ? 3 : 4.5);
        texts += 1;
        if (ratio < worst[0]) worst = [ratio, walker.currentNode.data, style.color + " on " + below];
    }
    return [...worst, texts];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    with open_tab() as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """A page of a usual size, about which the browser has nothing to report in the end."""
    browser.open("about:blank")
    browser.resize(1200, 900)
    browser.prefer(color_scheme="light")
    browser.events.clear()
    yield browser
    problems = browser.list_problems()
    browser.open("about:blank")
    assert problems == []


@pytest.fixture(scope="module")
def demo() -> Iterator[AgentProcess]:
    with open_known_agent(command="demo") as agent:
        yield agent


@pytest.fixture
def host() -> FixedHost:
    return FixedHost(make_snapshot(*READINGS))


@pytest.fixture
def watcher() -> FixedWatcher:
    return FixedWatcher(*make_reports(READINGS, State.PROGRESSING, now=time.monotonic()))


@pytest.fixture
def url(browser: Tab, host: FixedHost, watcher: FixedWatcher) -> Iterator[str]:
    with serve_host(host, watcher) as port:
        yield f"http://127.0.0.1:{port}/"
        browser.open("about:blank")  # a page whose server is gone has something to report


def wait_polls(tab: Tab, number: int) -> None:
    """Wait until the page has asked so often."""
    tab.evaluate(f"({{}} , (() => {{ {COUNT_POLLS} }})())")
    tab.wait_until(f"window.polls >= {number}")


def find_stalled(agent: AgentProcess) -> list[str]:
    return [vcpu["name"] for vcpu in agent.get_json("/api/v1/vcpus")["vcpus"] if vcpu["state"] == "stalled"]


def test_a_stall_shows_up_within_three_seconds(tab: Tab, demo: AgentProcess, tell: Callable[[str], None]) -> None:
    tab.open(f"http://127.0.0.1:{demo.port}/")
    tab.wait_until(f"{HEADLINE}.startsWith('No vCPU')")
    wait_until(lambda: find_stalled(demo), "a stall in the demo", CYCLE_SECONDS)
    known = time.monotonic()
    tab.wait_until(f"{HEADLINE}.includes('no forward progress: vCPU 0 of batch-1')", 3.0)
    seconds = time.monotonic() - known
    since = tab.evaluate("Date.now() - new Date(document.querySelector('.is-stalled time').dateTime)") / 1000
    tell(f"a stall is on the page {seconds:.1f} s after the API has it, {since:.1f} s after the vCPU got stuck")
    first = "document.querySelector('table.vcpus tbody tr')"
    assert tab.evaluate(f"{first}.className") == "is-stalled"
    for text in ("stalled", "batch-1", "research", "0xffffffff81a04d10"):
        assert text in tab.evaluate(f"{first}.innerText")
    assert tab.evaluate("document.title").startswith("1 stalled")
    tab.wait_until(f"{first}.querySelector('.plot .line').getAttribute('d').length > 0", 10)
    assert "SIMULATED, not real" in tab.read_text()


def test_rows_and_facts_are_there_without_javascript(tab: Tab, demo: AgentProcess) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(f"http://127.0.0.1:{demo.port}/?refresh=1&q=batch")
        html = tab.call("DOM.getOuterHTML", nodeId=tab.call("DOM.getDocument")["root"]["nodeId"])["outerHTML"]
        asked = [url for url in tab.list_requests() if url.startswith("http")]
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "batch-1" in html
    assert 'http-equiv="refresh"' in html
    assert ">Stop refreshing</a>" in html
    assert len(asked) == 1


def test_everything_comes_from_the_agent(tab: Tab, demo: AgentProcess) -> None:
    tab.open(f"http://127.0.0.1:{demo.port}/")
    wait_polls(tab, 2)
    assert {url.split("?")[0] for url in tab.list_requests()} <= {
        f"http://127.0.0.1:{demo.port}/",
        f"http://127.0.0.1:{demo.port}/-/status",
    }


def test_the_policy_is_in_force(browser: Tab, url: str) -> None:
    browser.open(url)
    violated = browser.evaluate("""new Promise((tell) => {
        addEventListener("securitypolicyviolation", (event) => tell(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
    })""")
    assert violated.startswith("script-src")
    assert browser.evaluate("window.ran") is None
    browser.evaluate("document.body.setAttribute('style', 'color: red')")
    assert browser.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"


def test_a_vm_called_script_is_text(tab: Tab) -> None:
    readings = [make_vm_reading(name, pid, vm_id=f"{name}{pid}") for pid, name in enumerate(HOSTILE_NAMES, 1)]
    watcher = FixedWatcher(*make_reports(readings, State.STALLED, State.QUIET, now=time.monotonic()))
    with serve_host(FixedHost(make_snapshot(*readings)), watcher) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        wait_polls(tab, 2)
        watcher.watch_report = replace(watcher.watch_report, vcpus=make_reports(readings, State.STALLED))
        tab.wait_until(f"{HEADLINE}.startsWith('{len(readings)} vCPUs')")
        assert tab.evaluate(ROWS) >= len(readings)
        assert SCRIPT in tab.evaluate("[...document.querySelectorAll('.name')].map((e) => e.textContent)")
        assert tab.evaluate("document.querySelectorAll('script').length") == 1
        assert tab.evaluate("document.querySelectorAll('img, iframe, object, [onload], [onerror]').length") == 0
        assert "invoice\\u202egnp.exe" in tab.read_text()
        for width in (1200, 400):
            tab.resize(width, 900)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.open("about:blank")
    assert not [event for event in tab.events if event["method"] == "Page.javascriptDialogOpening"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_is_text_in_every_sentence(tab: Tab, name: str) -> None:
    reading = make_vm_reading(name, 1, vm_id=name)
    now = time.monotonic()
    watcher, drill = FixedWatcher(), replace(make_report(State.STALLED, vm=reading.vm), drill=True)
    sources = (SourceReport("stats_fd", True), SourceReport(name, False, name, name))
    with serve_host(FixedHost(make_snapshot(reading, sources=sources)), watcher, host_name=name) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        for vcpus, problem, words in (
            (make_reports([reading], State.STALLED, now=now), "", "no forward progress"),
            (make_reports([reading], State.SUSPECT, now=now), "", "may be stuck"),
            ((drill,), "", "Drill, not real"),
            ((), name, "is not known"),
        ):
            watcher.watch_report = replace(watcher.watch_report, vcpus=vcpus, problem=problem)
            tab.wait_until(f"document.getElementById('head').textContent.includes('{words}')")
            elements = "document.querySelectorAll('{}').length"
            assert tab.evaluate(elements.format("script, style, title")) == 3
            assert tab.evaluate(elements.format("img, b, iframe, svg:not(.plot), [onload], [onerror]")) == 0
        tab.open("about:blank")
    assert not [event for event in tab.events if event["method"] == "Page.javascriptDialogOpening"]


@pytest.mark.live
def test_a_real_vm_called_script_is_found_and_is_text(tab: Tab) -> None:
    with open_guest_process(vcpus=2, name=SCRIPT, port_writes=1), open_known_agent() as agent:
        tab.open(f"http://127.0.0.1:{agent.port}/?q=%3Cscript%3E")
        assert SCRIPT in tab.evaluate("[...document.querySelectorAll('.quiet .name')].map((e) => e.textContent)")
        assert "0 notify exits" in tab.evaluate("document.querySelector('.quiet').innerText")
        for text in ("unsupported", "What a zero means here", "Sources of the counters", "debugfs"):
            assert text in tab.read_text()
        assert tab.evaluate("document.querySelectorAll('script').length") == 1
        assert tab.list_problems() == []
        tab.open("about:blank")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(
    tab: Tab, url: str, watcher: FixedWatcher, scheme: str, tell: Callable[[str], None]
) -> None:
    drill = replace(make_report(State.STALLED), drill=True)
    reports = make_reports(READINGS, State.STALLED, State.SUSPECT, State.QUIET, now=time.monotonic())
    watcher.watch_report = replace(watcher.watch_report, vcpus=(*reports, drill))
    tab.prefer(color_scheme=scheme)
    worst = 99.0
    for query in ("", "?q=web", "?q=nothing"):
        tab.open(url + query)
        tab.evaluate("document.getElementById('alarm').textContent = 'No answer'")
        ratio, text, colours, texts = tab.evaluate(MEASURE_CONTRAST)
        assert texts > 40
        assert ratio >= 1, (text, colours)
        worst = min(worst, ratio)
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(1")
    assert dark == (scheme == "dark")
    tell(f"status page, {scheme}: the faintest text has {worst:.2f} times the contrast that AA wants")


def test_search_by_keyboard_alone(tab: Tab, url: str) -> None:
    tab.open(url)
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "To the vCPUs"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    tab.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "vcpus"
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "q"
    assert tab.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert tab.evaluate(ROWS) == 3
    tab.type("batch")
    tab.wait_until(f"{ROWS} === 1")
    assert tab.evaluate("[document.activeElement.id, document.getElementById('q').value]") == ["q", "batch"]
    assert tab.evaluate("location.search") == "?q=batch"
    assert "1 of 3 vCPUs" in tab.evaluate("document.getElementById('count').textContent")
    tab.press("Enter")
    assert tab.evaluate("location.search") == "?q=batch"
    tab.open(url + tab.evaluate("location.search"))  # as a bookmark
    assert tab.evaluate(ROWS) == 1


def test_polls_leave_the_reader_alone(tab: Tab, url: str, watcher: FixedWatcher) -> None:
    tab.resize(1200, 300)
    tab.open(url)
    tab.evaluate("""
        const name = [...document.querySelectorAll(".name")].find((e) => e.textContent === "web-2").firstChild;
        getSelection().selectAllChildren(name);
        document.getElementById("pause").focus({preventScroll: true});
        window.row = name.closest("tr");
        scrollTo(0, 120);
        window.heard = 0;
        new MutationObserver(() => { window.heard += 1; }).observe(
            document.querySelector("[role=status]"), {subtree: true, childList: true, characterData: true});
    """)
    wait_polls(tab, 3)
    assert tab.evaluate("getSelection().toString()") == "web-2"
    assert tab.evaluate("[document.activeElement.id, scrollY]") == ["pause", 120]
    assert tab.evaluate("window.heard") == 0
    reports = make_reports(READINGS, State.PROGRESSING, State.STALLED, State.PROGRESSING, now=time.monotonic())
    watcher.watch_report = replace(watcher.watch_report, vcpus=reports)
    tab.wait_until(f"{HEADLINE}.includes('vCPU 0 of web-2')")
    wait_polls(tab, 2)
    assert tab.evaluate("window.heard") == 1  # said once, though it is stuck for ever longer
    assert tab.evaluate("getSelection().toString()") == "web-2"
    assert tab.evaluate("window.row === document.querySelector('.vcpus tbody tr') && window.row.isConnected")


def test_it_can_be_paused(tab: Tab, url: str) -> None:
    tab.open(url)
    wait_polls(tab, 1)
    tab.evaluate("document.getElementById('pause').click()")
    assert tab.evaluate("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    tab.wait_until("document.getElementById('clock').textContent.startsWith('Paused')")
    asked = len(tab.list_requests())
    tab.evaluate("new Promise((go) => setTimeout(go, 2500))")
    assert len(tab.list_requests()) == asked
    tab.evaluate("document.getElementById('q').focus()")
    tab.type("batch")
    tab.wait_until(f"{ROWS} === 1")  # what is asked for is answered
    assert tab.evaluate(CLOCK).startswith("Paused: as of ")
    tab.evaluate("document.getElementById('pause').click()")
    tab.wait_until("document.getElementById('clock').textContent.startsWith('As of')")


def test_a_tab_that_nobody_sees_does_not_ask(tab: Tab, url: str) -> None:
    tab.open(url)
    wait_polls(tab, 1)
    tab.evaluate("""
        Object.defineProperty(document, "hidden", {configurable: true, get: () => window.away});
        window.away = true;
        document.dispatchEvent(new Event("visibilitychange"));
    """)
    tab.evaluate("new Promise((go) => setTimeout(go, 500))")  # what is under way may end
    asked = len(tab.list_requests())
    tab.evaluate("new Promise((go) => setTimeout(go, 2500))")
    assert len(tab.list_requests()) == asked
    tab.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    wait_polls(tab, 1)


def test_when_the_agent_is_gone_the_page_says_that_it_is_old(
    browser: Tab, host: FixedHost, watcher: FixedWatcher, tell: Callable[[str], None]
) -> None:
    with serve_host(host, watcher) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        wait_polls(browser, 1)
        assert browser.evaluate(STALE) is False
    seconds = browser.wait_until(STALE)
    tell(f"the page says that it is old {seconds:.1f} s after the agent has ended")
    text = browser.evaluate("document.getElementById('alarm').textContent")
    assert text.startswith("No answer from the agent since ")
    assert text.endswith("what is shown is old.")
    assert browser.evaluate("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
    assert browser.evaluate(ROWS) == 3
    with serve_host(host, watcher, port):
        browser.wait_until(f"!{STALE}")
        assert browser.evaluate("document.getElementById('alarm').textContent") == ""


def test_a_tab_that_is_opened_behind_others_does_not_ask(browser: Tab, url: str) -> None:
    source = "Object.defineProperty(document, 'hidden', {get: () => true})"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    try:
        browser.events.clear()
        browser.open(url)
        browser.evaluate("new Promise((go) => setTimeout(go, 2500))")
        assert not [asked for asked in browser.list_requests() if "-/status" in asked]
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        browser.open("about:blank")


@pytest.fixture
def agent(browser: Tab) -> Iterator[ScriptedAgent]:
    """Answers the script as it is told to."""
    frame = Frame("", "", "hv-17", {})
    picture = make_status_view(make_snapshot(*READINGS), MonitorReport(trigger="bpf"), RateHistory(), 100.0, 1.7e9)
    agent = ScriptedAgent(
        render_page(frame, picture, picture.find("", True), True),
        lambda query: render_parts(frame, picture, picture.find(query, True), True),
    )
    with agent.run():
        yield agent
        browser.open("about:blank")


def test_an_agent_that_fails_is_asked_ever_more_seldom_and_the_page_is_old(browser: Tab, agent: ScriptedAgent) -> None:
    agent.answers[""] = (500, 0.0)
    browser.open(agent.url)
    browser.wait_until(STALE)
    assert "(it answers 500): what is shown is old." in browser.evaluate(ALARM)
    browser.wait_until("performance.now() > 9000")
    pauses = [after - before for (before, _), (after, _) in pairwise(agent.asked)]
    assert pauses[0] > 1.5
    assert pauses[1] > 3


def test_an_agent_that_does_not_answer_is_given_up(browser: Tab, agent: ScriptedAgent) -> None:
    agent.answers[""] = (200, 60.0)
    browser.open(agent.url)
    assert browser.wait_until(STALE, 12.0) > 4


def test_an_answer_to_an_old_question_is_none_to_the_new_one(browser: Tab, agent: ScriptedAgent) -> None:
    agent.answers["web"] = (200, 1.5)
    browser.open(agent.url)
    browser.evaluate("document.getElementById('q').focus()")
    browser.type("web")
    wait_until(lambda: "web" in [query for _, query in agent.asked], "the question")
    browser.evaluate("const box = document.getElementById('q'); box.value = 'batch'; box.form.requestSubmit()")
    browser.wait_until(f"{ROWS} === 1")
    browser.evaluate("""
        window.most = 0;
        new MutationObserver(() => {
            window.most = Math.max(window.most, document.querySelectorAll("table.vcpus tbody tr").length);
        }).observe(document.getElementById("rows"), {subtree: true, childList: true});
    """)
    browser.evaluate("new Promise((go) => setTimeout(go, 2500))")
    assert browser.evaluate("window.most") <= 1


def test_a_busy_agent_is_asked_again_before_anything_is_said(browser: Tab, agent: ScriptedAgent) -> None:
    agent.answers[""] = (503, 0.0)
    browser.open(agent.url)
    browser.wait_until(STALE)
    assert len(agent.asked) == 3
    assert "(it answers 503)" in browser.evaluate(ALARM)
    pauses = [after - before for (before, _), (after, _) in pairwise(agent.asked)]
    assert all(1 <= pause < 3 for pause in pauses)
    agent.answers.clear()
    browser.wait_until(f"!{STALE}")
    assert browser.evaluate(ALARM) == ""


def test_the_clock_is_the_agents(browser: Tab, agent: ScriptedAgent) -> None:
    browser.open(agent.url)
    assert browser.evaluate(CLOCK) == "As of 22:13:20 UTC"
    browser.evaluate("document.getElementById('pause').click()")
    assert browser.evaluate(CLOCK) == "Paused: as of 22:13:20 UTC"
    browser.evaluate("document.getElementById('pause').click()")
    browser.wait_until(f"{CLOCK} === 'As of 01:02:03 UTC'")


@pytest.mark.parametrize("width", [320, 400, 800, 1000])
def test_no_width_needs_sideways_scrolling(tab: Tab, url: str, width: int) -> None:
    tab.resize(width, 900)
    tab.open(url)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1200, 1600, 800])
def test_nothing_jumps_sideways_when_numbers_change(tab: Tab, width: int) -> None:
    """The left edges of columns and figures are where they were, whatever numbers, names and reasons are in them."""
    measure = """[...document.querySelectorAll(".vcpus thead th, .vcpus tbody tr > *, .figures div, .facts div")].map(
        (e) => [e.dataset.label || e.innerText.split("\\n").pop(), Math.round(e.getBoundingClientRect().left)])"""
    host, watcher = FixedHost(make_snapshot(*READINGS)), FixedWatcher()
    seen = []
    with serve_host(host, watcher) as port:
        tab.resize(width, 900)
        for exits, age in ((1, 3.0), (111_111, 61.0), (88_888_888, 3_601.0), (9, 700_000.0)):
            now = time.monotonic()
            host.snapshot = make_snapshot(*(make_vm_reading(f"web-{exits}", pid, (exits, 0)) for pid in range(1, 4)))
            reports = make_reports(host.snapshot.readings, State.STALLED, State.SUSPECT, State.QUIET, now=now - age)
            watcher.watch_report = replace(
                watcher.watch_report, vcpus=tuple(replace(report, notify_exits=exits) for report in reports)
            )
            tab.open(f"http://127.0.0.1:{port}/")
            seen.append(tab.evaluate(measure))
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("getComputedStyle(document.body).fontVariantNumeric") == "tabular-nums"
        tab.open("about:blank")
    assert len(seen[0]) > 30
    assert all(places == seen[0] for places in seen[1:])


@pytest.mark.parametrize("width", [1200, 400])
def test_a_screen_reader_finds_a_table_with_headers(tab: Tab, url: str, width: int) -> None:
    tab.resize(width, 900)
    tab.open(url)
    tab.call("Accessibility.enable")
    nodes = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    roles = [role for role, _name in found]
    assert ("table", "vCPUs with notify exits, worst first") in found
    assert roles.count("rowheader") >= 3
    assert roles.count("columnheader") >= 8
    assert ("searchbox", "Search") in found
    assert {"banner", "main", "contentinfo", "navigation", "search", "status", "alert"} <= set(roles)
    assert roles.count("status") == 2  # the headline, and how much a search has found
    assert any(role == "image" and "last 5 minutes" in name for role, name in found)
    assert [name for role, name in found if role == "button"] == ["Pause", "Find"]


def test_ten_thousand_vcpus_are_no_larger_a_document(tab: Tab, tell: Callable[[str], None]) -> None:
    measured = []
    for vms in (4, 625):
        snapshot = make_large_host(vms, 16, 3)
        watcher = FixedWatcher(*make_reports(snapshot.readings, State.PROGRESSING, now=time.monotonic()))
        with serve_host(FixedHost(snapshot), watcher) as port:
            tab.open(f"http://127.0.0.1:{port}/")
            assert tab.evaluate(ROWS) == 50
            wait_polls(tab, 1)
            length, nodes = tab.evaluate(
                "[document.documentElement.outerHTML.length, document.querySelectorAll('*').length]"
            )
            tab.evaluate("const box = document.getElementById('q'); box.value = 'web-3 web'; box.form.requestSubmit()")
            tab.wait_until("document.getElementById('count').textContent.includes('match')")
            measured.append((length, nodes))
            tab.open("about:blank")
    (small, small_nodes), (large, large_nodes) = measured
    tell(f"status page in the browser, 10,000 vCPUs: {large:,} characters, {large_nodes:,} elements")
    assert large < 1.2 * small
    assert large_nodes <= 1.1 * small_nodes
