"""Patterns match as they say, and no name makes one slow: with RE2, and with what ``re`` is trusted with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from exporter.patterns import BadPattern, choose_names, compile_pattern, find_re2

EVIL_PATTERN = "^([a-z0-9]+-?)+$"
EVIL_NAME = "a" * 127 + "!"
ENGINES = {"re2": find_re2(), "re": None}
engines = pytest.mark.parametrize("re2", [pytest.param(module, id=name) for name, module in ENGINES.items()])


def measure_match(pattern: str, re2: ModuleType | None, name: str) -> tuple[bool, float]:
    """Whether it matches, and how many seconds that took."""
    compiled = compile_pattern(pattern, re2)
    started = time.perf_counter()
    return compiled.matches(name), time.perf_counter() - started


def test_re2_is_installed_with_the_agent() -> None:
    assert ENGINES["re2"] is not None
    assert compile_pattern("a", ENGINES["re2"]).engine == "re2"
    assert compile_pattern("a", None).engine == "re"


@engines
@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("web", "my-web-1", True),
        ("^web", "my-web-1", False),
        ("^(web|db)-[a-z]+-[0-9]+$", "db-prod-17", True),
        ("^(web|db)-[a-z]+-[0-9]+$", "db-prod-17x", False),
        ("(?i)WEB(-test)?$", "web-test", True),
        (r"\d{2,3}-x", "a17-x", True),
        ("^tenant-[^/]*$", "tenant-\ud800", True),
        ("ü", "fünf", True),
        ("", "", True),
    ],
)
def test_both_engines_agree(re2: ModuleType | None, pattern: str, name: str, matches: bool) -> None:
    assert compile_pattern(pattern, re2).matches(name) is matches


def test_an_evil_name_takes_re2_no_time(tell: Callable[[str], None]) -> None:
    matches, seconds = measure_match(EVIL_PATTERN, ENGINES["re2"], EVIL_NAME)
    assert not matches
    assert seconds < 0.1
    tell(f"hostile name of 128 bytes at {EVIL_PATTERN}: {seconds * 1e6:.0f} us with RE2; re alone refuses the pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        EVIL_PATTERN,
        "a*a*a*b",
        "(a|b)*c",
        "(ab){2,}",
        "(a?){40}",
        "a?" * 11,
        "(a|ab)" * 11,
        "[a-z]*[a-z]*(aa|bb|cc|dd|ee|ff|gg|hh)?(ii|jj)?.?",
        r"(a)\1",
        "(?=a)b",
        "(?<!a)b",
        "a*+b",
        ".{0,1000}.{0,1000}.{0,1000}",
    ],
)
def test_without_re2_a_pattern_that_may_be_slow_is_refused_and_the_remedy_named(pattern: str) -> None:
    with pytest.raises(BadPattern, match="google-re2"):
        compile_pattern(pattern, None)


@pytest.mark.parametrize(
    "pattern",
    ["[a-z]*[a-z]*-", "a?a?a?a?[a-z]*[a-z]*-", "a{0,15}a*a*-", "a?" * 10 + "-", "a?a?a?a?a?a?a?a*-", "a*.*-"],
)
def test_the_slowest_patterns_that_are_accepted_without_re2_are_fast(pattern: str, tell: Callable[[str], None]) -> None:
    matches, seconds = measure_match(pattern, None, EVIL_NAME)
    assert not matches
    assert seconds < 1
    tell(f"name of 128 bytes at {pattern} without google-re2: {seconds * 1e3:.1f} ms")


@engines
@pytest.mark.parametrize("pattern", ["(", "[", "a{2,1}", "*", "(" * 5000])
def test_what_is_no_pattern_is_refused(re2: ModuleType | None, pattern: str) -> None:
    with pytest.raises(BadPattern, match="no regular expression"):
        compile_pattern(pattern, re2)


def test_the_agent_starts_without_re2_and_names_it_where_it_is_needed() -> None:
    """As the .deb runs it: nothing called re2 can be imported."""
    program = (
        "import sys; sys.modules['re2'] = None; from exporter.cli import parse_command_line as parse; "
        "print(parse(sys.argv[1:]).vm_include.engine)"
    )
    words = [sys.executable, "-c", program, "demo"]
    refused = subprocess.run([*words, f"--vm.include={EVIL_PATTERN}"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "google-re2, which is not installed" in refused.stderr
    accepted = subprocess.run([*words, "--vm.include=^web"], capture_output=True, text=True, check=True)
    assert accepted.stdout == "re\n"


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        (None, None, ["vcpu/exits", "vcpu/halt_exits", "vm/mmu_flooded"]),
        ("exits", None, ["vcpu/exits", "vcpu/halt_exits"]),
        (None, "^vcpu/exits$", ["vcpu/halt_exits", "vm/mmu_flooded"]),
        ("^vcpu/", "halt", ["vcpu/exits"]),
    ],
)
def test_names_are_chosen_by_what_includes_and_what_excludes(
    include: str | None, exclude: str | None, wanted: list[str]
) -> None:
    patterns = [None if text is None else compile_pattern(text, find_re2()) for text in (include, exclude)]
    wants = choose_names(*patterns)
    assert [name for name in ("vcpu/exits", "vcpu/halt_exits", "vm/mmu_flooded") if wants(name)] == wanted
