"""The sentences of the status page, as plain text: what is the matter, what a zero says, how stalls are found."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from heapq import nsmallest
from typing import Final

from exporter.host_summary import has_counters
from exporter.stalls.verdicts import AgentUsage, State, name_vector
from exporter.status_page.view import SHOWN_NAMES, Row, StatusView
from kvm.model import NOTIFY_WINDOW_EXITS, Protection

MAX_NAME: Final = 120
MAX_NAME_IN_SENTENCE: Final = 48
MAX_REASON: Final = 500
# More marks than this upon one letter are no writing: they would cover the lines around it.
MAX_MARKS: Final = 4
# Letters by their category, and nothing to see: Hangul fillers, and Braille without a dot.
BLANK: Final = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# The page says so if its snapshot is as old as this.
OLD_SECONDS: Final = 10.0

ZERO_MEANS: Final = {
    Protection.ARMED: "moves when it happens: a 0 says that it has not",
    Protection.OFF: "stays 0: the host could, the VMM did not ask for it",
    Protection.UNSUPPORTED: "stays 0: KVM says that this host cannot force notify exits",
    Protection.UNKNOWN: "says nothing when it is 0: whether notify exits are armed cannot be seen",
}


class Level(StrEnum):
    """How much a headline matters."""

    CALM = "calm"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Headline:
    """The first thing a reader sees: one sentence that stays the same until something happens, and what it means."""

    level: Level
    text: str
    meaning: str


def clean_name(text: str, limit: int = MAX_NAME) -> str:
    """Return untrusted text as it may be shown: what is invisible, or turns text around, is spelled out."""
    cleaned, length, marks = [], 0, 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        is_fine = character.isprintable() and character not in BLANK and marks <= MAX_MARKS
        cleaned.append(character if is_fine else _spell(ord(character)))
        length += len(cleaned[-1])
        if length >= limit:
            break
    return "".join(cleaned) + "…" * (len(cleaned) < len(text))


def count_things(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def count_rows(rows: Sequence[Row]) -> str:
    """Return how many vCPUs there are in some rows, and how many VMs of which only the sum is known."""
    vms = sum(row.vcpu is None for row in rows)
    counts = ((len(rows) - vms, "vCPU"), (vms, "VM"))
    return " and ".join(count_things(number, what) for number, what in counts if number)


def render_time(unix: float, now: float) -> str:
    """Render a time of day in UTC, with the date where it is another day."""
    then, today = datetime.fromtimestamp(unix, UTC), datetime.fromtimestamp(now, UTC)
    return f"{then:%H:%M:%S}" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M:%S}"


def render_duration(seconds: float) -> str:
    """Render a duration in at most two units."""
    whole = max(0, round(seconds))
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def name_row(row: Row, with_details: bool) -> str:
    """Name a vCPU in a sentence, which the name's own direction of writing leaves alone (U+2068 to U+2069)."""
    name = f"\u2068{clean_name((with_details and row.vm.owner.name) or row.vm.id, MAX_NAME_IN_SENTENCE)}\u2069"
    return f"VM {name}" if row.vcpu is None else f"vCPU {row.vcpu.index} of {name}"


def make_headline(view: StatusView, with_details: bool) -> Headline:
    """Say what is the matter on this host."""
    if view.snapshot is None:
        return Headline(Level.WARN, "The host has not been read yet.", "The first snapshot is under way.")
    found = _tell_stuck(view, with_details) or _tell_problem(view) or _tell_unjudged(view)
    found = found or _tell_calm(view)
    if found.level is Level.CALM and _has_unread(view):
        found = replace(found, level=Level.WARN, meaning=f"{_EXPLAIN_UNREAD} {found.meaning}")
    age = view.now - view.snapshot.monotonic_seconds
    if age <= OLD_SECONDS:
        return found
    level = Level.WARN if found.level is Level.CALM else found.level
    return replace(found, level=level, meaning=f"What is known is {render_duration(age)} old. {found.meaning}")


def _tell_stuck(view: StatusView, with_details: bool) -> Headline | None:
    if lost := view.find_in(State.CONTEXT_LOST):
        text = f"The CPU has lost the state of {count_things(len(lost), 'vCPU')}: {_list_rows(lost, with_details)}."
        return Headline(Level.BAD, text, _EXPLAIN_LOST)
    if stalled := view.find_in(State.STALLED):
        text = f"{count_things(len(stalled), 'vCPU makes', 'vCPUs make')} no forward progress"
        return Headline(Level.BAD, f"{text}: {_list_rows(stalled, with_details)}.", _EXPLAIN_STALL)
    if suspects := view.find_in(State.SUSPECT):
        text = f"{count_things(len(suspects), 'vCPU')} may be stuck: {_list_rows(suspects, with_details)}."
        return Headline(Level.WARN, text, "Two notify exits in a row at one RIP; a verdict follows in seconds.")
    if still := [row for row in view.find_in(State.UNKNOWN) if _was_stuck(row)]:
        text = f"{count_things(len(still), 'vCPU was', 'vCPUs were')} stuck and cannot be judged now"
        return Headline(Level.WARN, f"{text}: {_list_rows(still, with_details)}.", _EXPLAIN_STILL)
    return None


def _tell_problem(view: StatusView) -> Headline | None:
    if view.snapshot is not None and not has_counters(view.snapshot):
        return Headline(Level.WARN, "The counters of this host cannot be read.", "The sources below say why.")
    if view.snapshot is not None and not view.snapshot.complete:
        return Headline(Level.WARN, "There may be VMs on this host that are not seen.", _EXPLAIN_INCOMPLETE)
    if view.report is None or view.report.problem:
        why = "This agent does not detect stalls."
        if view.report:
            why = f"Why: {clean_name(view.report.problem, MAX_REASON)}."
        return Headline(Level.WARN, f"{_count_notified(view)} Whether one is stuck is not known.", why)
    return None


def _tell_unjudged(view: StatusView) -> Headline | None:
    """Say of how many it is not known whether they are stuck: nobody may call that calm."""
    rows = list(_find_unjudged(view))
    if not rows:
        return None
    subject, where = ("it is", "its row") if len(rows) == 1 else ("they are", "their rows")
    text = f"{_count_notified(view)} Of {count_rows(rows)} it is not known whether {subject} stuck."
    return Headline(Level.WARN, text, f"Why is said in {where}.")


def _tell_calm(view: StatusView) -> Headline:
    if not view.find_real():
        return Headline(Level.CALM, _count_notified(view), _explain_none(view))
    new = view.find_in(State.NOTIFYING)
    text = f"No vCPU {'that was read ' * _has_unread(view)}is {'known to be ' * bool(new)}stuck."
    meaning = f"{count_rows(new)} {'has' if len(new) == 1 else 'have'} yet to be judged." if new else _EXPLAIN_NOTIFIED
    if not new and view.report is not None and view.report.context_invalid is None:
        meaning += " Whether the CPU has lost a guest's state at one is not known: that takes the BPF trigger."
    return Headline(Level.CALM, f"{text} {_count_notified(view)}", meaning)


def describe_drills(view: StatusView, with_details: bool) -> str:
    """Say that an alarm is being tested, "" where none is."""
    drills = view.find_in(*State, drill=True)
    return f"Drill, not real: {_list_rows(drills, with_details)} is said to be stuck and is well." if drills else ""


def describe_watch(view: StatusView) -> tuple[str, str]:
    """Say how notify exits are noticed: in a word or two, and in a sentence."""
    report = view.report
    if report is None:
        return "by nobody", "This agent does not detect stalls."
    if report.trigger == "bpf" and report.trigger_missed:
        period = f"every {report.poll_period_seconds:.3g} s"
        text = "A BPF trigger on handle_notify() does not tell of all notify exits here, so counters are polled"
        return period, f"{text} {period} too."
    if report.trigger == "bpf":
        return "as they happen", "A BPF trigger on handle_notify() tells of each notify exit."
    if report.trigger == "poll":
        period = f"every {report.poll_period_seconds:.3g} s"
        why = clean_name(report.trigger_problem, MAX_REASON) or "none is asked for"
        return period, f"Counters that can move are polled {period}, for want of a BPF trigger: {why}."
    return "nothing", "No VM of this host can take notify exits."


def describe_usage(usage: AgentUsage) -> str:
    """Say what the agent itself uses."""
    seconds = sum(usage.cpu_seconds.values())
    busiest = max(usage.cpu_seconds, key=lambda kind: usage.cpu_seconds[kind])
    return (
        f"{count_things(usage.threads, 'thread')}; {seconds:.1f} s of CPU time since it started, most of it in "
        f"{busiest}; {usage.involuntary_switches:,} times it was made to wait for a CPU."
    )


def describe_age(view: StatusView) -> str:
    """Say that the newest snapshot is an old one, "" where it is not."""
    if view.snapshot is None:
        return ""
    age = view.now - view.snapshot.monotonic_seconds
    return f"The newest snapshot is {render_duration(age)} old: numbers have stopped coming." * (age > OLD_SECONDS)


def list_evidence(row: Row) -> list[str]:
    """Say what speaks for a verdict."""
    if row.report is None:
        if row.vcpu is None and row.notify_exits:
            return ["only the VM's sum can be read, so nobody can tell which vCPU it is"]
        return [row.reading.counters.problem] if row.reading and row.reading.counters.problem else []
    verdict = row.report.verdict
    said = [verdict.reason]
    if row.state is not State.QUIET and row.report.vcpu.tid is None:
        said.append("its thread is not known, so its exits cannot be traced")
    elif row.state is State.NOTIFYING:
        said.append(row.report.deferred_reason)
    if row.state in (State.STALLED, State.SUSPECT):
        if verdict.registers_alike is not None:
            said.append("registers unchanged" if verdict.registers_alike else "registers read once")
        if verdict.cpu_percent is not None:
            said.append(f"its thread uses {verdict.cpu_percent:.0f} % of a CPU")
        if vector := name_vector(verdict.idt_vectoring):
            said.append(f"delivering {vector}")
        if verdict.nested:
            said.append("the RIP may be that of a nested guest")
    if verdict.context_invalid:
        said.append("context invalid: the CPU has lost its state")
    return [text for text in said if text]


_EXPLAIN_STALL: Final = (
    "It takes notify exits at one RIP and does nothing else. The host is safe: each exit gives the CPU back. Ask the "
    "owner what runs there; pause or reset the VM if its CPU time is needed."
)
_EXPLAIN_LOST: Final = (
    "A notify exit came with an invalid context: the vCPU cannot go on, and the VMM stops the VM. That is the fault of "
    "the processor or its microcode. Tell the owner and reset the VM."
)
_EXPLAIN_STILL: Final = "Its counter stands still: the VM may be paused or stopped."
_EXPLAIN_INCOMPLETE: Final = "There may be VMs that are not listed; kvm-notify-exporter check says what to do."
_EXPLAIN_UNREAD: Final = "Some VMs cannot be read: nothing is known of their vCPUs."
_EXPLAIN_NOTIFIED: Final = "Their guests go on: a notify exit now and then costs a guest time, and no more."


def _explain_none(view: StatusView) -> str:
    counts = view.count_protections()
    if not counts:
        return "There is no VM."
    armed = counts.get(Protection.ARMED, 0)
    if armed == sum(counts.values()):
        return "All VMs have notify exits armed: none has opened no event window for too long."
    if armed:
        return (
            f"{count_things(armed, 'VM has', 'VMs have')} notify exits armed; for the others a 0 means less, see below."
        )
    if counts.get(Protection.UNKNOWN):
        return "Whether notify exits are armed cannot be seen here, so a 0 does not mean that all is well; see below."
    return "No VM can take any: their counters stay 0; see below."


def _count_notified(view: StatusView) -> str:
    rows, of_those = view.find_real(), _has_unread(view)
    if not rows:
        return f"No vCPU {'that was read' if of_those else 'of this host'} has taken a notify exit."
    text = f"{count_rows(rows)} {'has' if len(rows) == 1 else 'have'} taken notify exits"
    return f"{text}, of those that were read." if of_those else f"{text}."


def _has_unread(view: StatusView) -> bool:
    """Tell whether there are VMs of which no notify counter was read."""
    readings = view.snapshot.readings if view.snapshot else ()
    return any(
        NOTIFY_WINDOW_EXITS not in counters.per_vcpu and NOTIFY_WINDOW_EXITS not in counters.totals
        for counters in (reading.counters for reading in readings)
    )


def _find_unjudged(view: StatusView) -> Iterator[Row]:
    """Yield the rows that may be stuck for all that is known; a counter that stands still is judged by that."""
    for row in view.find_real():
        if row.state in (None, State.UNKNOWN) or (
            row.state is not State.QUIET and row.report is not None and not row.report.can_judge
        ):
            yield row


def _list_rows(rows: Sequence[Row], with_details: bool) -> str:
    """Name the first few, in an order that stays: a screen reader reads the sentence again if it changes."""
    first = nsmallest(SHOWN_NAMES, rows, key=lambda row: (row.vm.id, row.history_id))
    named = ", ".join(name_row(row, with_details) for row in first)
    more = len(rows) - SHOWN_NAMES
    return f"{named} and {more:,} more" if more > 0 else named


def _was_stuck(row: Row) -> bool:
    return row.report is not None and row.report.verdict.stuck_since_seconds is not None


def _spell(code: int) -> str:
    if 0xD800 <= code <= 0xDFFF:  # an undecodable byte
        return "�"
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
