"""What is asked for: which rows, by what they are sorted, which is selected. And what each key does to that. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from exporter.top.comparison import EXITS_KEY, NOTIFY_KEY
from kvm.model import VmKey

MAX_TYPED: Final = 60


class Place(NamedTuple):
    """A VM, or the vCPU of it that has KVM's id ``vcpu_id``."""

    vm: VmKey
    vcpu_id: int | None = None


class Opened(NamedTuple):
    """What was drilled into: the vCPUs of a VM, or the statistics of a VM or vCPU."""

    place: Place
    has_statistics: bool


class Question(StrEnum):
    """What is being typed."""

    SEARCH = "search"
    SORT = "sort by"


@dataclass(frozen=True, slots=True)
class View:
    """``opened`` is the way down, ``selected`` the row's identity (None: the first), ``at`` where it was last."""

    sort: str = NOTIFY_KEY
    all_vcpus: bool = False
    opened: tuple[Opened, ...] = ()
    search: str = ""
    question: Question | None = None
    typed: str = ""
    selected: Place | str | None = None
    at: int = 0
    is_frozen: bool = False
    has_help: bool = False


class Shown(NamedTuple):
    """What is on the screen: rows by their identities, how many fit, the statistics in columns, and all there are."""

    rows: Sequence[Place | str]
    page: int
    columns: Sequence[str]
    statistics: Collection[str]


def find_selected(view: View, rows: Sequence[Place | str]) -> int:
    """Return the number of the selected row: it is followed where it goes; where it has gone, the next is selected."""
    if view.selected is None or not rows:
        return 0
    try:
        return rows.index(view.selected)
    except ValueError:
        return min(view.at, len(rows) - 1)


def find_statistics(typed: str, statistics: Collection[str]) -> list[str]:
    """Return the statistics that are meant, likeliest first: by their whole name, its beginning, a part of it."""
    wanted = typed.strip().casefold()

    def rank(key: str) -> tuple[bool, bool, str]:
        name = key.partition("/")[2]
        return wanted not in (key, name), not name.startswith(wanted), key

    return sorted((key for key in statistics if wanted in key), key=rank)


def press(view: View, key: str, shown: Shown) -> View | None:
    """Return what a key makes of it, None if it is to end; a key is a letter, or a word as in ``KEYS``."""
    if view.question is not None:
        return _type(view, key, shown)
    if view.has_help:
        return replace(view, has_help=False)
    if key == "q":
        return None
    action = KEYS.get(key)
    return action(view, shown) if action else view


def _type(view: View, key: str, shown: Shown) -> View:
    """Answer the question; a search is applied as it is typed."""
    if key == "escape":
        search = "" if view.question is Question.SEARCH else view.search
        return replace(view, question=None, typed="", search=search)
    if key == "enter":
        answered = replace(view, question=None, typed="")
        if view.question is Question.SORT and (found := find_statistics(view.typed, shown.statistics)):
            return _sort(answered, found[0])
        return answered
    typed = view.typed
    if key == "backspace":
        typed = typed[:-1]
    elif len(key) == 1 and key.isprintable() and len(typed) < MAX_TYPED:
        typed += key
    return replace(view, typed=typed, search=typed if view.question is Question.SEARCH else view.search)


def _move(steps: Callable[[Shown], int]) -> Callable[[View, Shown], View]:
    def move(view: View, shown: Shown) -> View:
        if not shown.rows:
            return view
        at = max(0, min(len(shown.rows) - 1, find_selected(view, shown.rows) + steps(shown)))
        return replace(view, selected=shown.rows[at], at=at)

    return move


def _select_first(view: View, _shown: Shown) -> View:
    return replace(view, selected=None, at=0)


def _sort(view: View, key: str) -> View:
    return replace(view, sort=key, selected=None, at=0)


def _sort_beside(step: int) -> Callable[[View, Shown], View]:
    """Sort by the column to the left or right of the one that sorts."""

    def sort(view: View, shown: Shown) -> View:
        if view.sort not in shown.columns:
            return view
        at = shown.columns.index(view.sort) + step
        return _sort(view, shown.columns[at]) if 0 <= at < len(shown.columns) else view

    return sort


def _open(view: View, shown: Shown, *, has_statistics: bool) -> View:
    """Go down: from a VM to its vCPUs, from a vCPU to its statistics, or to the statistics at once."""
    if not shown.rows or (view.opened and view.opened[-1].has_statistics):
        return view
    place = shown.rows[find_selected(view, shown.rows)]
    if isinstance(place, str):
        return view
    opened = Opened(place, has_statistics or place.vcpu_id is not None)
    return replace(view, opened=(*view.opened, opened), search="", selected=None, at=0)


def _go_back(view: View, _shown: Shown) -> View:
    """Forget the search, or go up to the row from which one came."""
    if view.search:
        return replace(view, search="")
    if not view.opened:
        return view
    return replace(view, opened=view.opened[:-1], selected=view.opened[-1].place, at=0)


def _ask(question: Question) -> Callable[[View, Shown], View]:
    return lambda view, _shown: replace(
        view, question=question, typed=view.search if question is Question.SEARCH else ""
    )


def _switch_vcpus(view: View, _shown: Shown) -> View:
    return replace(view, all_vcpus=not view.all_vcpus, opened=(), selected=None, at=0)


KEYS: Final[Mapping[str, Callable[[View, Shown], View]]] = MappingProxyType(
    {
        "up": _move(lambda _shown: -1),
        "down": _move(lambda _shown: 1),
        "k": _move(lambda _shown: -1),
        "j": _move(lambda _shown: 1),
        "pageup": _move(lambda shown: -shown.page),
        "pagedown": _move(lambda shown: shown.page),
        "home": _select_first,
        "end": _move(lambda shown: len(shown.rows)),
        "left": _sort_beside(-1),
        "right": _sort_beside(1),
        "<": _sort_beside(-1),
        ">": _sort_beside(1),
        "enter": lambda view, shown: _open(view, shown, has_statistics=False),
        "a": lambda view, shown: _open(view, shown, has_statistics=True),
        "escape": _go_back,
        "backspace": _go_back,
        "/": _ask(Question.SEARCH),
        "s": _ask(Question.SORT),
        "n": lambda view, _shown: _sort(view, NOTIFY_KEY),
        "e": lambda view, _shown: _sort(view, EXITS_KEY),
        "v": _switch_vcpus,
        "f": lambda view, _shown: replace(view, is_frozen=not view.is_frozen),
        " ": lambda view, _shown: replace(view, is_frozen=not view.is_frozen),
        "?": lambda view, _shown: replace(view, has_help=True),
        "h": lambda view, _shown: replace(view, has_help=True),
    }
)
