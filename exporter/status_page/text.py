"""Sentences of the status page, as plain text: names and numbers, what a zero says, how stalls are found."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from datetime import UTC, datetime
from heapq import nsmallest
from typing import Final

from exporter.stalls.verdicts import AgentUsage, Evidence, State, name_vector
from exporter.status_page.view import SHOWN_NAMES, Row, StatusView, rank_stuck
from exporter.untrusted_text import clean_name
from kvm.model import Protection

MAX_NAME_IN_SENTENCE: Final = 48
MAX_REASON: Final = 500
# The page says so if its snapshot is as old as this.
OLD_SECONDS: Final = 10.0

ZERO_MEANS: Final = {
    Protection.ARMED: "moves when it happens: a 0 says that it has not",
    Protection.OFF: "stays 0: the host could, the VMM did not ask for it",
    Protection.UNSUPPORTED: "stays 0: KVM says that this host cannot force notify exits",
    Protection.UNKNOWN: "says nothing when it is 0: whether notify exits are armed cannot be seen",
}


def count_things(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def choose(things: Sized, one: str, many: str) -> str:
    """Return the words for one thing or for some."""
    return one if len(things) == 1 else many


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


def describe_drills(view: StatusView, with_details: bool) -> str:
    """Say that an alarm is being tested, "" where none is."""
    drills = view.find_in(*State, drill=True)
    said = choose(drills, "is said to be stuck and is well", "are said to be stuck and are well")
    return f"Drill, not real: {list_rows(drills, with_details)} {said}." if drills else ""


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
        return "as they happen", "A BPF trigger on handle_notify() tells of each vCPU that takes notify exits."
    if report.trigger == "poll":
        period = f"every {report.poll_period_seconds:.3g} s"
        why = clean_name(report.trigger_problem, MAX_REASON) or "none is asked for"
        return period, f"Counters that can move are polled {period}, for want of a BPF trigger: {why}."
    if view.snapshot is None or not view.snapshot.complete:
        return "nothing", "No VM that is seen can take notify exits; there may be others."
    return "nothing", "No VM of this host can take notify exits."


def describe_usage(usage: AgentUsage) -> str:
    """Say what the agent itself uses."""
    seconds = sum(usage.cpu_seconds.values())
    busiest = max(usage.cpu_seconds, key=lambda kind: usage.cpu_seconds[kind])
    return (
        f"{count_things(usage.threads, 'thread')}; {seconds:.1f} s of CPU time since it started, most of it in "
        f"{busiest}; {count_things(usage.involuntary_switches, 'time')} it was made to wait for a CPU."
    )


def describe_evidence(view: StatusView) -> str:
    """Say what tells where notify exits are."""
    report = view.report
    if report is None or report.problem:
        return "Nothing tells where notify exits are."
    if report.evidence is Evidence.KERNEL:
        return "KVM itself tells where each notify exit is (it has the patches of kvm/patches)."
    return "A trace of a vCPU's exits, for moments, tells where its notify exits are."


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
            is_sure = verdict.evidence is Evidence.KERNEL
            said.append(f"the RIP {'is' if is_sure else 'may be'} that of a nested guest")
        if verdict.evidence is not None:
            said.append(f"evidence: {_EVIDENCE[verdict.evidence]}")
    if verdict.context_invalid:
        said.append("context invalid: the CPU has lost its state")
    return [text for text in said if text]


_EVIDENCE: Final = {Evidence.KERNEL: "KVM's own statistics", Evidence.TRACE: "a trace of its exits"}


def list_rows(rows: Sequence[Row], with_details: bool) -> str:
    """Name the first few, in the table's order; it stays, as a screen reader reads the sentence again if it changes."""
    first = nsmallest(SHOWN_NAMES, rows, key=rank_stuck)
    named = ", ".join(name_row(row, with_details) for row in first)
    more = len(rows) - SHOWN_NAMES
    return f"{named} and {more:,} more" if more > 0 else named
