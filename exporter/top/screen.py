"""Lays the table out in so many columns and lines. Pure: a view and a comparison in, lines of text out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from datetime import datetime
from enum import Enum
from typing import Final, NamedTuple

from exporter.top.cells import UNKNOWN, cut, fit, measure_width, render_amount, render_value
from exporter.top.comparison import EXITS_KEY, NOTIFY_KEY, Comparison, Subject
from exporter.top.notes import Status, find_notes
from exporter.top.rows import Row, build_rows, find_subject, name_vm
from exporter.top.view import Question, Shown, View, find_selected, find_statistics
from exporter.untrusted_text import clean_name
from kvm.model import Snapshot

# The columns, as far as there is room for them and the kernel has them: what explains a slow guest.
PREFERRED: Final = (
    *(NOTIFY_KEY, EXITS_KEY, "vcpu/halt_exits", "vcpu/halt_wait_ns", "vcpu/io_exits", "vcpu/mmio_exits"),
    *("vcpu/irq_injections", "vcpu/irq_exits", "vcpu/pf_taken", "vcpu/tlb_flush"),
)
NUMBER_WIDTH: Final = 8
NARROW: Final = 60
MOST_NAME: Final = 40
_COUNT_WIDTH: Final = 7  # of VCPUS, with the space around it
# So many lines that they can all be read in ten, and so short that they can in forty columns.
_HELP: Final = (
    ("q", "leave"),
    ("/", "search names, ids, owners"),
    ("n, e", "sort by notify exits, by exits"),
    ("s, < >", "sort by any statistic; by column"),
    ("enter", "open: vCPUs, then statistics"),
    ("a", "all statistics of the row"),
    ("esc", "forget the search, go back"),
    ("v", "all vCPUs, or VMs"),
    ("f", "freeze, and go on"),
)


class Style(Enum):
    """How a line stands out; each can be read without, too."""

    PLAIN = "plain"
    BOLD = "bold"
    REVERSE = "reverse"


class Line(NamedTuple):
    """One line, as wide as the screen."""

    text: str
    style: Style = Style.PLAIN


class Screen(NamedTuple):
    """All lines, and what keys need to know of them."""

    lines: Sequence[Line]
    shown: Shown


def render_screen(view: View, comparison: Comparison | None, status: Status, width: int, height: int | None) -> Screen:
    """Lay out ``height`` lines, or as many as it takes (None)."""
    if comparison is None:
        waiting = [Line("reading the host"), *(Line(note, Style.BOLD) for note in find_notes(None, status))]
        return Screen(_fill(waiting, "q leave", width, height), Shown((), 1, (), ()))
    if view.has_help:
        return Screen(
            _fill(list(_render_help(comparison, status, width)), "any key goes back", width, height),
            Shown((), 1, (), comparison.statistics),
        )
    rows = build_rows(view, comparison)
    columns = choose_columns(view, comparison, width)
    notes = find_notes(comparison, status)
    head = [Line(_render_title(view, comparison.now, status, width)), Line(_describe_view(view, comparison))]
    most_notes = len(notes) if height is None else max(1, height // 6)
    head += [Line(note, Style.BOLD) for note in notes[:most_notes]]
    table = _lay_out(view, comparison, columns, width)
    head.append(Line(table.header, Style.REVERSE))
    page = len(rows) if height is None else max(1, height - len(head) - 1)
    selected = find_selected(view, [row.identity for row in rows])
    first = max(0, min(selected - page // 2, len(rows) - page))
    body = [
        Line(table.render(row, is_selected=height is not None and number == selected), _style(number == selected))
        for number, row in enumerate(rows[first : first + page], first)
    ]
    if not rows:
        body = [Line(_explain_no_rows(view, comparison))]
    shown = Shown([row.identity for row in rows], page, columns, comparison.statistics)
    return Screen(_fill([*head, *body], _render_footer(view, shown, width), width, height), shown)


def _style(is_selected: bool) -> Style:
    return Style.REVERSE if is_selected else Style.PLAIN


def _fill(lines: list[Line], footer: str, width: int, height: int | None) -> list[Line]:
    """Make all lines as wide as the screen, and so many that the footer is at its end."""
    if height is None:
        return [Line(line.text.rstrip()) for line in lines]
    room = max(0, height - 1)
    padded = [*lines[:room], *[Line("")] * (room - len(lines)), Line(footer)][:height]
    return [Line(fit(line.text, width), line.style) for line in padded]


def choose_columns(view: View, comparison: Comparison, width: int) -> tuple[str, ...]:
    """Return the statistics that have a column: what sorts, and as many others as there is room for."""
    left = width - _measure_fixed(view, width)
    wanted = [view.sort] + [key for key in PREFERRED if key in comparison.statistics and key != view.sort]
    chosen: set[str] = set()
    for key in wanted:
        needed = 2 + _measure_column(key)
        if not chosen or needed <= left:
            chosen.add(key)
            left -= needed
    order = PREFERRED if view.sort in PREFERRED else (view.sort, *PREFERRED)
    return tuple(key for key in order if key in chosen)


def _measure_column(key: str) -> int:
    return max(NUMBER_WIDTH, len(_title_column(key)))


def _title_column(key: str) -> str:
    return key.removeprefix("vcpu/")


def _measure_fixed(view: View, width: int) -> int:
    """Return how wide all but the statistics is, with the shortest name: the mark, the name, the number of vCPUs."""
    return 2 + _find_shortest_name(width) + (0 if view.opened else _COUNT_WIDTH)


def _find_shortest_name(width: int) -> int:
    return 10 if width < NARROW else 14


class _Table:
    """How a row is written; ``header`` is the line above."""

    def __init__(self, view: View, comparison: Comparison, columns: Sequence[str], width: int) -> None:
        self._view, self._comparison, self._columns, self._width = view, comparison, columns, width
        room = width - _measure_fixed(view, width) + _find_shortest_name(width)
        room -= sum(2 + _measure_column(key) for key in columns)
        self._name_width = max(1, min(MOST_NAME, room))
        count = f"{'VCPU' if view.all_vcpus else 'VCPUS':>{_COUNT_WIDTH}}"
        head = fit("VCPU  THREAD" if view.opened else "VM", self._name_width) + ("" if view.opened else count)
        titles = [("*" if key == view.sort else "") + _title_column(key) for key in columns]
        self.header = f"  {head}" + self._join(titles)

    def _join(self, cells: Sequence[str]) -> str:
        widths = [_measure_column(key) for key in self._columns]
        # Two spaces apart; the mark of what sorts stands in the second one.
        return "".join(f" {fit(cell, width + 1, right=True)}" for cell, width in zip(cells, widths, strict=True))

    def render(self, row: Row, *, is_selected: bool) -> str:
        """Write a row."""
        reading, position = subject = row.subject
        mark = "> " if is_selected else "  "
        vcpu = None if position is None else reading.vcpus[position]
        if self._view.opened and vcpu:
            name = f"{vcpu.index:>4}  {vcpu.tid or UNKNOWN}"
            return mark + fit(name, self._name_width) + self._render_numbers(subject)
        name = mark + fit(clean_name(name_vm(reading)), self._name_width)
        if not reading.source:
            return f"{name}  not read: {clean_name(reading.counters.problem)}"
        return f"{name}{self._name_vcpus(subject):>{_COUNT_WIDTH}}{self._render_numbers(subject)}"

    def _name_vcpus(self, subject: Subject) -> str:
        """Say which vCPU it is, or how many the VM has."""
        reading, position = subject
        if position is not None:
            return str(reading.vcpus[position].index)
        if self._view.all_vcpus:  # of which only sums were read: a number would be that of a vCPU
            return "all"
        return UNKNOWN if reading.vcpu_count is None else str(reading.vcpu_count)

    def _render_numbers(self, subject: Subject) -> str:
        described = self._comparison.statistics
        cells = [
            render_amount(self._comparison.find_amount(subject, key), described[key]) if key in described else UNKNOWN
            for key in self._columns
        ]
        return self._join(cells)


class _StatisticsTable:
    """How the statistics of one VM or vCPU are written."""

    def __init__(self, comparison: Comparison, width: int) -> None:
        self._comparison = comparison
        # Where there is no room for values, names are worth more.
        self._widths = (24, 10) if width >= NARROW else (10,)
        self._name_width = max(1, width - 2 - sum(2 + cell for cell in self._widths))
        self.header = self._join("  ", "STATISTIC", "VALUE", "PER SECOND")

    def _join(self, mark: str, name: str, value: str, rate: str) -> str:
        cells = (value, rate)[-len(self._widths) :]
        numbers = [fit(cell, width, right=True) for cell, width in zip(cells, self._widths, strict=True)]
        return "  ".join((mark + fit(name, self._name_width), *numbers))

    def render(self, row: Row, *, is_selected: bool) -> str:
        """Write a row."""
        subject, key = row
        descriptor = self._comparison.statistics[key]
        value = render_value(self._comparison.find_value(subject, key), descriptor)
        rate = render_amount(self._comparison.find_rate(subject, key), descriptor)
        return self._join("> " if is_selected else "  ", _title_column(key), value, rate)


def _lay_out(view: View, comparison: Comparison, columns: Sequence[str], width: int) -> _Table | _StatisticsTable:
    if view.opened and view.opened[-1].has_statistics:
        return _StatisticsTable(comparison, width)
    return _Table(view, comparison, columns, width)


def _render_title(view: View, snapshot: Snapshot, status: Status, width: int) -> str:
    """Say how much there is, who reads it, of which host and when."""
    vcpus = sum(reading.vcpu_count or 0 for reading in snapshot.readings)
    sources = sorted({reading.source for reading in snapshot.readings if reading.source})
    text = f"{len(snapshot.readings):,} VMs, {vcpus:,} vCPUs"
    text += f" by {', '.join(sources)}" if sources else ""
    when = f"{datetime.fromtimestamp(snapshot.unix_seconds):%H:%M:%S}"
    right = f"{'FROZEN ' if view.is_frozen else ''}{when}"
    left = width - measure_width(right) - 1
    name = clean_name(status.host_name)
    if name and measure_width(text) + measure_width(name) + 2 <= left:
        text += f"  {name}"
    return f"{fit(text, left)} {right}"


def _describe_view(view: View, comparison: Comparison) -> str:
    """Say what the rows are, and by what they are sorted."""
    what = "vCPUs" if view.all_vcpus else "VMs"
    by = f" by {view.sort}"
    if view.sort not in comparison.statistics or comparison.statistics[view.sort].is_cumulative:
        by += " per second"
    if view.opened:
        place, has_statistics = view.opened[-1]
        subject = find_subject(comparison, place)
        name = clean_name(name_vm(subject.reading), MOST_NAME) if subject else "a VM that has ended"
        what = f"vCPUs of {name}"
        if has_statistics:
            vcpu = subject.reading.vcpus[subject.position] if subject and subject.position is not None else None
            what, by = f"statistics of {f'vCPU {vcpu.index} of ' if vcpu else ''}{name}", ""
    return f"{what}{by}" + (f", with {clean_name(view.search)!r}" if view.search else "")


def _explain_no_rows(view: View, comparison: Comparison) -> str:
    if view.opened and find_subject(comparison, view.opened[-1].place) is None:
        return "it has ended; esc goes back"
    if view.search:
        return "nothing matches; esc shows all"
    if view.opened:
        return "only sums over all vCPUs are known of this VM; esc goes back, a there shows them"
    return "no VM found"


def _render_footer(view: View, shown: Shown, width: int) -> str:
    if view.question is Question.SORT:
        found = find_statistics(view.typed, shown.statistics)
        return cut(f"sort by: {clean_name(view.typed)}|  {'  '.join(found[:8]) or 'no such statistic'}", width)
    if view.question is Question.SEARCH:
        return f"search: {clean_name(view.typed)}|"
    hints = ["q leave", "? help", *(["esc back"] if view.opened or view.search else [])]
    hints += ["/ search", "s sort", "n notify exits", "enter open", "v vCPUs", "f freeze", "a all"]
    text = hints[0]
    for hint in hints[1:]:
        if len(text) + 2 + len(hint) <= width:
            text += f"  {hint}"
    return text


def _render_help(comparison: Comparison, status: Status, width: int) -> Iterator[Line]:
    """Yield what the keys do, and the whole text of what was cut."""
    yield from (Line(f"{keys:<7}{text}") for keys, text in _HELP)
    for note in find_notes(comparison, status):
        yield from (Line(text, Style.BOLD) for text in textwrap.wrap(note, max(20, width)))
