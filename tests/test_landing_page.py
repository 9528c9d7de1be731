"""The page at ``/``: escaped, self-contained, and it says how the sources went."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from exporter.landing_page import HEADERS, render_page
from kvm.model import SourceReport

LINKS = {"Metrics": "/metrics"}


class Outline(HTMLParser):
    """The tags, texts and links of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"href", "src"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_says_what_it_is() -> None:
    sources = [SourceReport("bpf", True), SourceReport("debugfs", False, "lockdown=integrity", "use bpf")]
    outline = Outline(render_page("0.1.0", "abc123", LINKS, sources))
    for text in (
        "KVM notify exporter",
        "Version 0.1.0, revision abc123",
        "does not work",
        "lockdown=integrity",
        "use bpf",
    ):
        assert text in outline.text
    assert outline.links == ["/metrics"]


def test_before_the_first_look() -> None:
    assert "not been looked at yet" in Outline(render_page("", "", LINKS, [])).text


def test_foreign_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    outline = Outline(render_page(evil, evil, {evil: "/" + evil}, [SourceReport(evil, False, evil, evil)]))
    assert "script" not in outline.tags
    assert outline.links == ["/" + evil]
    assert outline.text.count(evil) == 6


def test_nothing_may_load_but_the_style_sheet() -> None:
    page = render_page("", "", LINKS, [])
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert not re.search(r"url\(|@import|style=|http", page)
    assert "prefers-color-scheme: dark" in page
