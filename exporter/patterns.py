"""Patterns of ``--vm.include`` and ``--vm.exclude``: whoever names a VM must not choose how long a match takes.

Python's ``re`` tries one way after another, and holds the interpreter's lock meanwhile: for ``^([a-z0-9]+-?)+$`` and a
name of 40 letters that takes a day, in which there is no scrape and no exit. RE2 takes time in proportion to the name.
Where google-re2 is not installed (Debian has no package of it), ``re`` serves, with patterns only for which few ways
are possible: ``count_ways``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, TypeAlias

# A repeat that can end in more places than this counts as unbounded.
BOUNDED_REPEAT: Final = 16
# Alternatives, optional parts and bounded repeats multiply: so many ways through a pattern with no, one and two
# unbounded repeats. What takes longest, the last one at a name of 256 letters, takes 0.1 s; at 128, 0.02 s.
WAYS: Final = (1024, 128, 16)
# Names in labels are shorter (kvm/identity/vmm_cmdline.py); where one is not, its beginning decides.
NAME_CHARACTERS: Final = 256
NEEDS_RE2: Final = "this takes google-re2, which is not installed (pip install google-re2)"

# What the standard library's parser of patterns (re._parser) gives: operations with what they work on.
_Nodes: TypeAlias = Sequence[tuple[object, Any]]
_SINGLE: Final = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY"}
_REPEATS: Final = {"MAX_REPEAT", "MIN_REPEAT"}


class BadPattern(ValueError):
    """A pattern cannot be used; the message is for whoever wrote it."""


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern that is searched for in names; ``engine`` says what does it, "re2" or "re"."""

    text: str
    engine: str
    _search: Callable[[str], object] = field(repr=False, compare=False)

    def matches(self, name: str) -> bool:
        """Tell whether it matches anywhere in a name."""
        # An undecodable byte of a name is a lone surrogate, which RE2 cannot be given.
        clean = name[:NAME_CHARACTERS].encode(errors="replace").decode()
        return self._search(clean) is not None


def choose_names(include: NamePattern | None, exclude: NamePattern | None) -> Callable[[str], bool]:
    """Return what tells whether a name is wanted: ``include`` matches it, if given, and ``exclude`` does not."""
    return lambda name: (include is None or include.matches(name)) and not (exclude and exclude.matches(name))


def find_re2() -> ModuleType | None:
    """Return the module of google-re2, None where it is not installed."""
    try:
        return importlib.import_module("re2")
    except ImportError:
        return None


def compile_pattern(text: str, re2: ModuleType | None) -> NamePattern:
    """Compile a pattern with RE2 or, where that is None, with ``re``, if it is simple enough; raises BadPattern."""
    if re2 is None:
        return _compile_with_re(text)
    options = re2.Options()
    options.log_errors = False  # they are told once, and not by a library on standard error
    try:
        return NamePattern(text, "re2", re2.compile(text, options).search)
    except (re2.error, UnicodeEncodeError) as err:
        reason = err.args[0] if isinstance(err, re2.error) else err
        said = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        raise BadPattern(f"no regular expression of RE2: {said}") from err


def _compile_with_re(text: str) -> NamePattern:
    try:
        compiled = re.compile(text)
        # The parser of the standard library knows what a pattern means; another one could be wrong about it.
        unbounded, ways = count_ways(importlib.import_module("re._parser").parse(text))
    except (re.error, OverflowError, RecursionError) as err:
        raise BadPattern(f"no regular expression: {err}") from err
    if unbounded >= len(WAYS):
        raise BadPattern(f"{unbounded} unbounded repeats, more than {len(WAYS) - 1}: {NEEDS_RE2}")
    if ways > WAYS[unbounded]:
        raise BadPattern(f"more than {WAYS[unbounded]} combinations of alternatives and optional parts: {NEEDS_RE2}")
    return NamePattern(text, "re", compiled.search)


def count_ways(nodes: _Nodes) -> tuple[int, int]:
    """Count a parsed pattern's unbounded repeats, and in how many ways it can be gone through besides.

    ``re`` tries at most that many ways from each place of a name, and for each unbounded repeat each length. Raises
    BadPattern for what has no such bound: repeated groups, and what looks elsewhere.
    """
    unbounded, ways = 0, 1
    for operation, argument in nodes:
        more, branches = _count_node(str(operation), argument)
        unbounded, ways = unbounded + more, ways * branches
    return unbounded, ways


def _count_node(name: str, argument: Any) -> tuple[int, int]:  # noqa: ANN401 - each operation has its own
    if name in _SINGLE or name == "AT":
        return 0, 1
    if name == "SUBPATTERN":
        return count_ways(argument[-1])
    if name == "BRANCH":
        counts = [count_ways(branch) for branch in argument[1]]
        return max(unbounded for unbounded, _ in counts), sum(ways for _, ways in counts)
    if name in _REPEATS:
        return _count_repeat(*argument)
    raise BadPattern(f"a lookaround, backreference or the like ({name.lower()}) has no bound in time: {NEEDS_RE2}")


def _count_repeat(least: int, most: int, nodes: _Nodes) -> tuple[int, int]:
    if len(nodes) == 1 and str(nodes[0][0]) in _SINGLE:
        ends = most - least + 1
        return (1, 1) if ends > BOUNDED_REPEAT else (0, ends)
    if (least, most) == (0, 1):
        unbounded, ways = count_ways(nodes)
        return unbounded, ways + 1
    raise BadPattern(f"a repeated group has no bound in time: {NEEDS_RE2}")
