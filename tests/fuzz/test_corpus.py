"""What fuzzing began with and what it has found, given to every decoder and parser again; and a little chance."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, feed

ROOT = Path(__file__).parents[2]
# What an operator types, and nobody else.
TYPED = ("exporter/cli.py", "exporter/flag_values.py", "exporter/web/listeners.py")
CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*/*"))
CORPUS_BYTES = 200_000


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_what_is_in_the_corpus_is_taken_or_refused(path: Path) -> None:
    feed(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused(name: str, data: bytes) -> None:
    feed(name, data)


def test_every_target_has_a_corpus_and_it_is_small() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)
    assert sum(path.stat().st_size for path in FILES) < CORPUS_BYTES


def find_parsers() -> set[tuple[str, str]]:
    """Every public function of ours that decodes bytes or parses text, by file and name."""
    files = [path for package in ("kvm", "exporter") for path in (ROOT / package).rglob("*.py")]
    return {
        (str(path), node.name)
        for path in files
        if path.relative_to(ROOT).as_posix() not in TYPED
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("decode_", "parse_"))
    }


def test_the_corpus_reaches_every_decoder_and_parser() -> None:
    reached = set[tuple[str, str]]()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            reached.add((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        for path in FILES:
            feed(path.parent.name, path.read_bytes())
    finally:
        sys.setprofile(None)
    assert find_parsers() - reached == set()
