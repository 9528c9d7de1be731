"""What documents say is so: links lead somewhere, and what they name exists, is complete, and is called what it is."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from exporter.cli import COMMANDS, build_parser
from exporter.prometheus.collector import SNAPSHOT_FAILED
from exporter.prometheus.metrics import METRICS
from exporter.stalls.stall_log import CONTEXT_LOST_ID, RECOVERY_ID, STALL_ID, WITHHELD_ID
from exporter.stalls.verdicts import State
from exporter.web.settings import HEALTHY_PATH, READY_PATH, VCPUS_PATH
from kvm.host.privileges import NEEDED_CAPABILITIES
from kvm.model import Identity, Protection
from tests import metrics_document
from tests.documents import (
    ALL_DOCUMENTS,
    DOCS,
    README,
    ROOT,
    find_anchors,
    find_blocks,
    find_links,
    find_table,
    read_prose,
)
from tests.known_statistics import STATISTIC_METRICS
from tests.test_architecture import RANKS

README_LINES = 150
RULES = sorted((ROOT / "grafana" / "alerts").glob("*.rules.yml"))
GLOSSARY = DOCS / "glossary.md"
CODE_WITH_THESE_WORDS = [file for package in ("exporter", "grafana", "kvm") for file in (ROOT / package).rglob("*.py")]
# Roots of paths that a document gives from the top of the repository.
TOP = "docs exporter grafana kvm tests .ci".split()


@pytest.fixture(params=ALL_DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


def test_the_readme_leads_to_every_document() -> None:
    linked = {(README.parent / file).resolve() for file, _anchor in find_links(README)}
    assert set(ALL_DOCUMENTS) - {README} <= linked


def test_links_lead_somewhere(document: Path) -> None:
    for file, anchor in find_links(document):
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{document.name} links to {file}"
        if anchor:
            assert anchor in find_anchors(target), f"{document.name} links to {file}#{anchor}"


def find_code(document: Path) -> Iterator[str]:
    """What a document shows as code: inline, or in a block."""
    yield from re.findall(r"`([^`\n]+)`", read_prose(document))
    yield from find_blocks(document, "", "yaml", "promql")


def test_files_that_a_document_names_exist(document: Path) -> None:
    for code in find_code(document):
        for path in re.findall(rf"(?<![\w/.~-])(?:{'|'.join(TOP)})/[\w./*-]*", code):
            assert list(ROOT.glob(path.rstrip("/."))), f"{document.name} names {path}"


def test_modules_that_a_document_names_exist(document: Path) -> None:
    for code in find_code(document):
        names = re.findall(r"python -m (?!pytest)([\w.]+)", code)
        names += re.findall(r"^((?:kvm|exporter)(?:\.\w+)+)$", code)
        for name in names:
            assert importlib.util.find_spec(name), f"{document.name} names {name}"


def test_make_targets_that_a_document_names_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in find_code(document):
        assert set(re.findall(r"(?:^|[ =\d]) ?make ([a-z-]+)", code, re.MULTILINE)) <= targets, code


def find_recorded() -> set[str]:
    documents = [yaml.safe_load(file.read_text()) for file in RULES]
    return {
        rule["record"] for document in documents for group in document["groups"] for rule in group["rules"] if
        "record" in rule
    }  # fmt: skip


def test_metrics_that_a_document_names_exist(document: Path) -> None:
    """Those that are written out; ``kvm_host_.+`` is none."""
    known = {metric.name for metric in METRICS} | find_recorded() | STATISTIC_METRICS.keys()
    name = r"(?<![\w:])(?:\w+:)?kvm_(?:vcpu|vm|host|exporter)_\w+(?::\w+)*(?![\w:.*…])"
    assert {found for code in find_code(document) for found in re.findall(name, code)} <= known


def test_the_readme_has_five_metrics() -> None:
    rows = [cells[0] for cells in find_table(README, "metric", "look at it because")]
    assert len(rows) == 5
    assert {name.strip("`") for name in rows} <= {metric.name for metric in METRICS}


def test_the_tables_of_metrics_are_those_of_the_code() -> None:
    text = metrics_document.PATH.read_text()
    assert text == metrics_document.render_document(text), "run python -m tests.metrics_document"
    assert re.findall(r"^\| `(kvm_\w+)` \|", text, re.MULTILINE) == [metric.name for metric in METRICS]


def find_flags(command: str) -> set[str]:
    """The flags of a command that its help shows."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        option
        for action in commands.choices[command]._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-")
    } - {"--help"}


def test_every_command_and_flag_is_explained_and_no_other() -> None:
    page = DOCS / "commands.md"
    assert [row[0].strip("`") for row in find_table(page, "command", "does")] == list(COMMANDS)
    listed = [flag for row in find_table(page, "flag", "does") for flag in re.findall(r"`(--[\w.-]+)`", row[0])]
    assert len(set(listed)) == len(listed)
    assert set(listed) == find_flags("serve")
    every = set[str]().union(*(find_flags(command) for command in COMMANDS))
    named = set(re.findall(r"(?<![\w-])--(?!no-)([a-z][\w.-]*[a-z])(?![\w-])", page.read_text()))
    assert {f"--{name}" for name in named} <= every | {"--help"}
    assert {f"--{name}" for name in re.findall(r"--no-([\w.]+)", page.read_text())} <= every


def test_paths_of_the_server_are_explained() -> None:
    for path in (VCPUS_PATH, HEALTHY_PATH, READY_PATH):
        assert f"`{path}`" in (DOCS / "commands.md").read_text()


def test_tables_of_states_are_those_of_the_code() -> None:
    def find_names(document: str, *header: str) -> list[str]:
        return [row[0].strip("`") for row in find_table(DOCS / document, *header)]

    assert find_names("metrics.md", "state", "the counter", "meaning") == list(Protection)
    assert find_names("reading-a-warning.md", "state", "meaning") == list(State)
    assert find_names("sources-and-privileges.md", "identity", "who vouches") == list(Identity)


def test_capabilities_are_those_of_the_code() -> None:
    rows = find_table(DOCS / "sources-and-privileges.md", "capability", "needed")
    assert dict(rows) == NEEDED_CAPABILITIES


def test_messages_can_be_found_in_the_journal() -> None:
    text = (DOCS / "reading-a-warning.md").read_text()
    assert set(re.findall(r"`([0-9a-f]{32})`", text)) == {STALL_ID, RECOVERY_ID, CONTEXT_LOST_ID, WITHHELD_ID}
    assert set(re.findall(r"MESSAGE_ID=(\w+)", (DOCS / "runbook.md").read_text())) == {STALL_ID}


def test_every_reason_for_a_blind_spot_is_in_the_runbook() -> None:
    reasons = set(re.findall(r'BlindSpot\("(\w+)"', (ROOT / "kvm" / "blind_spots.py").read_text()))
    assert {row[0].strip("`") for row in find_table(DOCS / "runbook.md", "reason", "cause")} == {
        *reasons,
        SNAPSHOT_FAILED,
    }


def test_the_packages_are_those_of_the_architecture_test() -> None:
    rows = find_table(DOCS / "architecture.md", "packages and modules", "job")
    assert [set(re.findall(r"`([\w.]+)`", row[0])) for row in rows] == RANKS


def read_unused_words() -> dict[str, str]:
    """The words that are not used, as regular expressions, each with its term."""
    (block,) = find_blocks(GLOSSARY, "yaml")
    lines = [line.partition(": ") for line in block.splitlines()]
    return {pattern: term for pattern, _, term in lines}


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("A made-up host", "made[- ]up"),
        ("at the first look, each", "(an?|one|each"),
        ("says why=EPERM", "why="),
        ("hold statistics fds", "statistics fd"),
    ],
)
def test_the_list_of_words_finds_them(text: str, pattern: str) -> None:
    found = [words for words in read_unused_words() if re.search(words, text.lower())]
    assert len(found) == 1
    assert pattern in found[0]


def find_unused_words(text: str) -> list[str]:
    """Where a text uses words that are not used, with the terms."""
    lines = [re.sub(r"\s+", " ", line.lower()) for line in text.splitlines()]
    return [
        f"line {number}: {pattern} -> {term}"
        for number, line in enumerate(lines, 1)
        for pattern, term in read_unused_words().items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("file", [*ALL_DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_documents_use_the_words_of_the_glossary(file: Path) -> None:
    """Outside of samples, whose words are the code's."""
    assert find_unused_words(read_prose(file)) == []


@pytest.mark.parametrize("file", CODE_WITH_THESE_WORDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_uses_the_words_of_the_glossary(file: Path) -> None:
    assert find_unused_words(file.read_text()) == []


def test_terms_are_defined_once() -> None:
    terms = [
        term
        for row in re.findall(r"^\| ([^|]+) \| [^|]+ \|$", GLOSSARY.read_text(), re.MULTILINE)
        for term in row.split(", ")
        if term != "term"
    ]
    assert len(set(terms)) == len(terms) > 30
