"""The first thing a reader of the status page sees: what is the matter on this host, and what that means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from exporter.host_summary import has_counters
from exporter.stalls.verdicts import Evidence, State
from exporter.status_page.text import (
    MAX_REASON,
    OLD_SECONDS,
    choose,
    count_rows,
    count_things,
    list_rows,
    render_duration,
)
from exporter.status_page.view import Row, StatusView
from exporter.untrusted_text import clean_name
from kvm.model import Protection


class Level(StrEnum):
    """How much a headline matters; NEUTRAL where there is nothing that could be well or not."""

    NEUTRAL = "neutral"
    CALM = "calm"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Headline:
    """One sentence that stays the same until something happens, and what it means."""

    level: Level
    text: str
    meaning: str


_EXPLAIN_UNREAD: Final = "Some vCPUs cannot be read: nothing is known of them."


def make_headline(view: StatusView, with_details: bool) -> Headline:
    """Say what is the matter on this host."""
    if view.snapshot is None:
        return Headline(Level.WARN, "The host has not been read yet.", "The first snapshot is under way.")
    found = _tell_stuck(view, with_details) or _tell_problem(view) or _tell_unjudged(view)
    found = found or _tell_calm(view)
    if found.level not in (Level.BAD, Level.WARN) and _has_unread(view):
        found = replace(found, level=Level.WARN, meaning=f"{_EXPLAIN_UNREAD} {found.meaning}")
    age = view.now - view.snapshot.monotonic_seconds
    if age <= OLD_SECONDS:
        return found
    level = found.level if found.level is Level.BAD else Level.WARN
    return replace(found, level=level, meaning=f"What is known is {render_duration(age)} old. {found.meaning}")


def _tell_stuck(view: StatusView, with_details: bool) -> Headline | None:
    if lost := view.find_in(State.CONTEXT_LOST):
        text = f"The CPU has lost the state of {count_things(len(lost), 'vCPU')}: {list_rows(lost, with_details)}."
        return Headline(Level.BAD, text, choose(lost, *_EXPLAIN_LOST))
    if stalled := view.find_in(State.STALLED):
        text = f"{count_things(len(stalled), 'vCPU makes', 'vCPUs make')} no forward progress"
        return Headline(Level.BAD, f"{text}: {list_rows(stalled, with_details)}.", choose(stalled, *_EXPLAIN_STALL))
    if suspects := view.find_in(State.SUSPECT):
        text = f"{count_things(len(suspects), 'vCPU')} may be stuck: {list_rows(suspects, with_details)}."
        return Headline(Level.WARN, text, choose(suspects, *_EXPLAIN_SUSPECT))
    if still := [row for row in view.find_in(State.UNKNOWN) if _was_stuck(row)]:
        text = f"{count_things(len(still), 'vCPU was', 'vCPUs were')} stuck and cannot be judged now"
        return Headline(Level.WARN, f"{text}: {list_rows(still, with_details)}.", choose(still, *_EXPLAIN_STILL))
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
    text = f"{_count_notified(view)} Of {count_rows(rows)} it is not known whether {choose(rows, 'it is', 'they are')}"
    return Headline(Level.WARN, f"{text} stuck.", f"Why is said in {choose(rows, 'its row', 'their rows')}.")


def _tell_calm(view: StatusView) -> Headline:
    rows = view.find_real()
    if not rows:
        return Headline(*_tell_none(view))
    new = view.find_in(State.NOTIFYING)
    text = f"No vCPU {'that was read ' * _has_unread(view)}is {'known to be ' * bool(new)}stuck."
    meaning = choose(rows, *_EXPLAIN_NOTIFIED)
    if new:
        meaning = f"{count_rows(new)} {choose(new, 'has', 'have')} yet to be judged."
    elif (
        view.report is not None and view.report.context_invalid is None and view.report.evidence is not Evidence.KERNEL
    ):
        meaning += " Whether the CPU has lost a guest's state at one is not known: that takes the BPF trigger."
    return Headline(Level.CALM, f"{text} {_count_notified(view)}", meaning)


_EXPLAIN_STALL: Final = tuple(
    f"{exits} The host is safe: each exit gives the CPU back. {ask}"
    for exits, ask in (
        (
            "It takes notify exits at one RIP and does nothing else.",
            "Ask the owner what runs there; pause or reset the VM if its CPU time is needed.",
        ),
        (
            "Each takes notify exits at one RIP and does nothing else.",
            "Ask the owners what runs there; pause or reset VMs if their CPU time is needed.",
        ),
    )
)
_EXPLAIN_LOST: Final = (
    "A notify exit came with an invalid context: the vCPU cannot go on, and the VMM stops the VM. That is the fault of "
    "the processor or its microcode. Tell the owner and reset the VM.",
    "Notify exits came with an invalid context: the vCPUs cannot go on, and the VMM stops a VM at that. That is the "
    "fault of the processor or its microcode. Tell the owners and reset the VMs.",
)
_EXPLAIN_SUSPECT: Final = (
    "It took two notify exits in a row at one RIP; a verdict follows in seconds.",
    "Each took two notify exits in a row at one RIP; verdicts follow in seconds.",
)
_EXPLAIN_STILL: Final = (
    "Its counter stands still: the VM may be paused or stopped.",
    "Their counters stand still: the VMs may be paused or stopped.",
)
_EXPLAIN_INCOMPLETE: Final = "There may be VMs that are not listed; kvm-notify-exporter check says what to do."
_EXPLAIN_NOTIFIED: Final = (
    "Its guest goes on: a notify exit now and then costs a guest time, and no more.",
    "Their guests go on: a notify exit now and then costs a guest time, and no more.",
)


def _tell_none(view: StatusView) -> tuple[Level, str, str]:
    """Say what it means that no notify exit was taken: it is good where one could have been, and else nothing."""
    text, counts = _count_notified(view), view.count_protections()
    armed, vms = counts.get(Protection.ARMED, 0), sum(counts.values())
    if not vms:
        return Level.NEUTRAL, text, "There is no VM."
    if armed == vms:
        has, none = ("The VM has", "it") if vms == 1 else ("All VMs have", "none")
        return Level.CALM, text, f"{has} notify exits armed: {none} has opened no event window for too long."
    if armed:
        others = "for the other one" if vms - armed == 1 else "for the others"
        have = count_things(armed, "VM has", "VMs have")
        return Level.CALM, text, f"{have} notify exits armed; {others} a 0 means less, see below."
    if counts.get(Protection.UNKNOWN):
        meaning = (
            "Whether notify exits are armed cannot be seen here, so a 0 does not mean that all is well; see below."
        )
        return Level.NEUTRAL, text, meaning
    counter = "its counter stays" if vms == 1 else "their counters stay"
    return Level.NEUTRAL, text, f"{'The VM' if vms == 1 else 'The VMs'} can take none: {counter} 0; see below."


def _count_notified(view: StatusView) -> str:
    rows, of_those = view.find_real(), _has_unread(view)
    if not rows:
        return f"No vCPU {'that was read' if of_those else 'of this host'} has taken a notify exit."
    text = f"{count_rows(rows)} {choose(rows, 'has', 'have')} taken notify exits"
    return f"{text}, of those that were read." if of_those else f"{text}."


def _has_unread(view: StatusView) -> bool:
    """Tell whether there are vCPUs whose notify exits are in no number that was read."""
    return view.snapshot is not None and any(reading.notify_exits is None for reading in view.snapshot.readings)


def _find_unjudged(view: StatusView) -> Iterator[Row]:
    """Yield the rows that may be stuck for all that is known; a counter that stands still is judged by that."""
    for row in view.find_real():
        if row.state in (None, State.UNKNOWN) or (
            row.state is not State.QUIET and row.report is not None and not row.report.can_judge
        ):
            yield row


def _was_stuck(row: Row) -> bool:
    return row.report is not None and row.report.verdict.stuck_since_seconds is not None
