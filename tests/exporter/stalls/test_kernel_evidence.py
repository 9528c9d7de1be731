"""What two readings of a patched KVM's statistics show, and what the detector makes of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.monitor.tracked_vcpu import INTERRUPTIONS
from exporter.stalls.detector import StallDetector
from exporter.stalls.evidence import ObservationWindow
from exporter.stalls.kernel_evidence import UNDER_WAY, Finding, KernelCounts, KernelEvidence, Kind
from exporter.stalls.verdicts import Evidence, StallRule, State
from tests.fake_host import FakeStatistics, R

STUCK = KernelCounts(
    same_rip_exits=99,
    stuck_exits=90,
    context_invalid_exits=0,
    last_rip=R,
    last_guest_mode=False,
    streak=100,
    notify_exits=100,
    exits=130,
    irq_exits=30,
)
REGISTERS = {"rax": 1, "rcx": 2}


def add(counts: KernelCounts, **more: int) -> KernelCounts:
    return replace(counts, **{name: getattr(counts, name) + number for name, number in more.items()})


def repeat(counts: KernelCounts, exits: int = 10) -> KernelCounts:
    """So many more exits at the RIP, with nothing in between."""
    return add(counts, same_rip_exits=exits, stuck_exits=exits, streak=exits, notify_exits=exits, exits=exits)


def observe(*readings: KernelCounts) -> Finding:
    evidence = KernelEvidence()
    return [evidence.observe(reading) for reading in readings][-1]


def test_one_reading_shows_nothing_yet() -> None:
    assert observe(STUCK) == Finding(Kind.NOTHING)


def test_a_vcpu_that_took_no_notify_exit_is_not_hidden() -> None:
    none = KernelCounts(0, 0, 0, 0, False, 0, 0, 500, 20)
    assert observe(none).kind is Kind.NOTHING
    assert observe(none, add(none, exits=20)).kind is Kind.NOTHING


def test_repeats_with_nothing_in_between_are_at_the_rip() -> None:
    assert observe(STUCK, repeat(STUCK)) == Finding(Kind.AT_RIP, "", 10, 10)


def test_interrupts_of_the_host_may_come_in_between() -> None:
    now = add(repeat(STUCK), exits=8, irq_exits=8, stuck_exits=-8)
    assert observe(STUCK, now).kind is Kind.AT_RIP


def test_rip_0_is_one_like_any_other() -> None:
    at_0 = replace(STUCK, last_rip=0)
    assert observe(at_0, repeat(at_0)).kind is Kind.AT_RIP


def test_no_notify_exit_is_nothing() -> None:
    assert observe(STUCK, add(STUCK, exits=5, irq_exits=5)) == Finding(Kind.NOTHING)


@pytest.mark.parametrize("now", [replace(STUCK, last_rip=R + 2), replace(STUCK, last_guest_mode=True)])
def test_another_rip_or_guest_mode_is_progress_at_once(now: KernelCounts) -> None:
    now = add(replace(now, streak=1), notify_exits=1, exits=1)
    assert observe(STUCK, now) == Finding(Kind.PROGRESS, "it took a notify exit at another RIP", 1, 0)


def test_a_streak_that_began_anew_is_progress_once_two_readings_say_so() -> None:
    back = add(STUCK, same_rip_exits=8, stuck_exits=8, streak=-95, notify_exits=10, exits=10)
    assert observe(STUCK, back).kind is Kind.NOTHING
    found = observe(STUCK, back, repeat(back, 1))
    assert (found.kind, found.exits) == (Kind.PROGRESS, 11)


def test_a_reading_in_the_middle_of_an_exit_proves_nothing_and_loses_nothing() -> None:
    torn = add(repeat(STUCK), notify_exits=1, exits=1)  # counted, but not yet compared
    assert observe(STUCK, torn).kind is Kind.NOTHING
    assert observe(STUCK, torn, repeat(STUCK, 20)) == Finding(Kind.AT_RIP, "", 20, 20)


def test_registers_that_changed_are_progress() -> None:
    rep = add(repeat(STUCK), stuck_exits=-10)
    found = observe(STUCK, rep, add(repeat(rep), stuck_exits=-10))
    assert (found.kind, found.reason) == (Kind.PROGRESS, "its registers changed from one notify exit to the next")


def test_an_interrupt_between_any_two_hides_whether_registers_changed() -> None:
    now = add(repeat(STUCK), stuck_exits=-10, exits=10, irq_exits=10)
    assert observe(STUCK, now).kind is Kind.AT_RIP  # so the registers themselves have to be compared


def observe_bare(*readings: KernelCounts) -> Finding:
    """As where nobody reads registers beside."""
    evidence = KernelEvidence()
    return [evidence.observe(reading, has_registers=False) for reading in readings][-1]


def test_without_registers_only_stuck_exits_tell_a_stall_from_a_rep_that_is_interrupted() -> None:
    now = add(repeat(STUCK), stuck_exits=-10, exits=10, irq_exits=10)
    assert observe_bare(STUCK, now).kind is Kind.INTERRUPTED
    assert observe_bare(STUCK, add(now, stuck_exits=1)) == Finding(Kind.AT_RIP, "", 10, 10)
    assert observe_bare(STUCK, add(STUCK, exits=5, irq_exits=5)).kind is Kind.NOTHING
    rep = add(repeat(STUCK), stuck_exits=-10)
    assert observe_bare(STUCK, rep, add(repeat(rep), stuck_exits=-10)).kind is Kind.PROGRESS


def test_exits_of_other_kinds_interrupt() -> None:
    assert observe(STUCK, add(repeat(STUCK), exits=2)).kind is Kind.INTERRUPTED
    assert observe(STUCK, add(STUCK, exits=2)).kind is Kind.INTERRUPTED


def test_one_exit_interrupts_once_five_readings_say_so() -> None:
    readings = [STUCK, *(add(repeat(STUCK, exits), exits=1) for exits in (10, 20, 30, 40, 50))]
    assert {observe(*readings[:number]).kind for number in range(2, 6)} == {Kind.NOTHING}
    assert observe(*readings) == Finding(Kind.INTERRUPTED, "", 50, 50)
    assert observe(*readings, repeat(readings[-1])).kind is Kind.AT_RIP


def test_an_exit_that_is_under_way_does_not_interrupt() -> None:
    """KVM has counted it, and not yet of which kind it is; the readings after it tell."""
    under_way = add(repeat(STUCK), exits=1)
    assert observe(STUCK, under_way, add(repeat(under_way), exits=-1)) == Finding(Kind.AT_RIP, "", 20, 20)
    assert observe(STUCK, under_way, repeat(STUCK, 11)) == Finding(Kind.AT_RIP, "", 11, 11)
    assert observe(STUCK, under_way, add(under_way, exits=1)).kind is Kind.INTERRUPTED


def test_interruptions_are_counted_where_there_are_repeats() -> None:
    evidence, reading = KernelEvidence(), STUCK
    for _ in range(3):
        evidence.observe(reading)
        reading = add(repeat(reading), exits=2)
    assert evidence.interruptions == 2
    evidence.observe(reading)
    assert evidence.interruptions == 3
    evidence.observe(add(reading, exits=4))
    assert evidence.interruptions == 3
    evidence.observe(add(replace(reading, last_rip=R + 2, streak=1), notify_exits=1, exits=5))
    assert evidence.interruptions == 0


def test_an_unknown_rip_is_hidden_and_no_pair() -> None:
    hidden = add(replace(STUCK, streak=0, last_rip=0), notify_exits=5, exits=5)
    assert observe(hidden).kind is Kind.HIDDEN
    assert observe(STUCK, hidden).kind is Kind.HIDDEN
    known = add(replace(hidden, last_rip=R, streak=5), notify_exits=5, same_rip_exits=4, exits=5)
    assert observe(hidden, known).kind is Kind.NOTHING


def test_a_lost_context_is_told_by_its_counter() -> None:
    lost = add(replace(STUCK, streak=0, last_rip=0), notify_exits=1, context_invalid_exits=1, exits=1)
    assert observe(STUCK, lost).kind is Kind.LOST
    assert observe(lost).kind is Kind.HIDDEN  # it may have gone on since, for all that this says
    assert observe(KernelCounts(0, 0, 1, 0, False, 0, 1, 9, 0)).kind is Kind.LOST


def test_statistics_that_somebody_sets_to_0_begin_anew() -> None:
    for name in ("notify_exits", "same_rip_exits", "stuck_exits", "exits", "irq_exits"):
        assert observe(STUCK, add(repeat(STUCK), **{name: -getattr(STUCK, name)})) == Finding(Kind.NOTHING), name


Acts = list[tuple[int, bool, bool, int]]
acts = st.lists(
    st.tuples(st.sampled_from([R, R, R, R + 2]), st.booleans(), st.booleans(), st.sampled_from([1, 1, 2])), max_size=40
)


@given(acts, acts)
def test_what_is_found_is_what_the_guest_did(before: Acts, between: Acts) -> None:
    """Whatever happens between two readings, as KVM counts it: a stall is never made of anything else."""
    statistics = FakeStatistics()

    def live(lived: Acts) -> KernelCounts:
        for rip, is_notify, is_interrupt, registers in lived:
            statistics.account(rip, is_notify, is_interrupt and not is_notify, registers)
        return statistics.read()

    first, second = live(before), live(between)
    notified = [rip for rip, is_notify, _, _ in between if is_notify]
    others = [rip for rip, is_notify, is_interrupt, _ in between if not is_notify and not is_interrupt]
    evidence = KernelEvidence()
    evidence.observe(first)
    found = evidence.observe(second)
    while evidence.in_doubt:
        found = evidence.observe(second)
    if found.kind is Kind.AT_RIP:
        assert set(notified) == {first.last_rip}
        assert not others
    if first.streak and any(rip != first.last_rip for rip in notified):
        assert found.kind is Kind.PROGRESS
    if found.kind is Kind.PROGRESS:
        registers = {number for _, is_notify, _, number in [*before, *between] if is_notify}
        assert len({first.last_rip, *notified}) > 1 or len(registers) > 1


class Watched:
    """A detector that is shown a reading each 0.1 s."""

    def __init__(self, counts: KernelCounts, *, has_registers: bool = True) -> None:
        self.has_registers = has_registers
        self.detector = StallDetector(StallRule(), 100.0)
        self.now, self.counts = 100.0, counts
        self.show(counts)

    def show(self, counts: KernelCounts, registers: dict[str, int] | None = None) -> State:
        began, ended = self.now, self.now + 0.001
        self.detector.observe_kernel(began, ended, counts, self.has_registers)
        registers = (registers or REGISTERS) if self.has_registers else {}
        self.detector.observe_registers(began, ended, registers, counts.last_guest_mode)
        self.detector.observe_counter(began, ended, counts.notify_exits)
        self.counts, self.now = counts, self.now + 0.1
        return self.detector.state

    def show_all(self, step: Callable[[KernelCounts], KernelCounts], times: int) -> Iterable[State]:
        return [self.show(step(self.counts)) for _ in range(times)]


def test_a_change_is_told_of_and_nothing_else_is() -> None:
    watched, changes = Watched(STUCK), []
    watched.detector.on_change = lambda: changes.append(watched.detector.rip_hidden)
    watched.show(watched.counts)
    assert changes == []
    watched.detector.observe_hidden(watched.now, "it cannot be seen")
    assert changes.pop()
    watched.show(watched.counts)  # though it took no exit
    assert not changes.pop()
    changes.clear()
    watched.show(add(watched.counts, notify_exits=1, exits=1, same_rip_exits=0))
    watched.show(repeat(watched.counts))
    assert changes


def test_a_stall_is_called_after_a_second_and_ten_exits() -> None:
    watched = Watched(STUCK)
    states = list(watched.show_all(repeat, 13))
    assert states[0] is State.SUSPECT
    assert states.index(State.STALLED) in (11, 12)
    verdict = watched.detector.verdict
    assert (verdict.evidence, verdict.rip, verdict.streak, verdict.nested) == (Evidence.KERNEL, R, 230, False)
    assert verdict.registers_alike


def test_without_registers_the_rule_is_the_same_by_kvms_own_comparison() -> None:
    watched = Watched(STUCK, has_registers=False)
    states = list(watched.show_all(repeat, 14))
    assert states[0] is State.SUSPECT
    assert states.index(State.STALLED) in (11, 12)
    assert watched.detector.verdict.registers_alike
    interrupted = Watched(STUCK, has_registers=False)
    interrupted.show_all(lambda counts: add(repeat(counts), stuck_exits=-10, exits=10, irq_exits=10), 30)
    assert interrupted.detector.state is not State.STALLED
    assert interrupted.detector.interruptions == 30


def test_a_second_without_ten_exits_is_no_stall() -> None:
    watched = Watched(STUCK)
    states = [watched.show(repeat(watched.counts, number % 2)) for number in range(18)]
    assert set(states[1:]) == {State.SUSPECT}
    assert State.STALLED in watched.show_all(repeat, 3)


def test_ten_exits_and_then_nothing_is_no_stall() -> None:
    """What a guest does that leaves no trace in any counter is not held against it."""
    watched = Watched(STUCK)
    watched.show(repeat(STUCK, 50))
    assert State.STALLED not in watched.show_all(lambda counts: counts, 30)


def test_a_window_lasts_from_the_latest_first_exit_to_the_earliest_last_one() -> None:
    window = ObservationWindow(0.0)
    window.take_exits(0.0, 10.0, 20)
    assert (window.exits, window.seconds) == (20, 0.0)
    window.take_exits(10.0, 10.5, 1)
    window.take_exits(10.5, 30.0, 1)
    assert (window.exits, window.seconds) == (22, 0.5)


@pytest.mark.parametrize("pauses", [(10.0, 0.1), (0.1, 10.0)])
def test_it_is_not_known_when_between_two_readings_exits_came(pauses: tuple[float, float]) -> None:
    """All may have come just after the first, or just before the second: nothing else happened that is counted."""
    watched = Watched(STUCK)
    for pause in pauses:
        watched.now += pause
        assert watched.show(repeat(watched.counts, 20)) is State.SUSPECT
    watched.now += 2.0
    watched.show(repeat(watched.counts))
    watched.now += 2.0
    assert watched.show(repeat(watched.counts)) is State.STALLED


def test_other_exits_in_between_start_afresh() -> None:
    watched = Watched(STUCK)
    for _ in range(10):
        assert State.STALLED not in watched.show_all(repeat, 6)
        watched.show(add(repeat(watched.counts), exits=1))
    assert watched.detector.state is State.SUSPECT
    assert State.STALLED in watched.show_all(repeat, UNDER_WAY + 13)


def test_a_reading_of_two_that_falls_into_an_exit_hides_no_stall() -> None:
    watched = Watched(STUCK)
    for _ in range(8):
        watched.show(add(repeat(watched.counts), exits=1))
        watched.show(add(repeat(watched.counts), exits=-1))
    assert watched.detector.state is State.STALLED
    assert watched.detector.interruptions == 0


@pytest.mark.parametrize("has_registers", [True, False])
def test_who_is_interrupted_now_and_then_is_left_to_a_trace(has_registers: bool) -> None:
    """As by a timer of the guest's: in the time between no stall could be called, however long it lasts."""
    watched = Watched(STUCK, has_registers=has_registers)
    for _ in range(INTERRUPTIONS):
        watched.show_all(repeat, 3)
        watched.show(add(repeat(watched.counts), exits=2))
    assert watched.detector.state is State.SUSPECT
    assert watched.detector.interruptions == INTERRUPTIONS
    assert State.STALLED in watched.show_all(repeat, 15)
    assert watched.detector.interruptions == 0


def test_the_time_of_a_reading_that_is_not_believed_does_not_count() -> None:
    """All exits since the reading before it may have come before it, too."""
    watched = Watched(STUCK)
    watched.show_all(repeat, 3)
    watched.now += 100.0
    watched.show(add(repeat(watched.counts, 20), exits=1))
    watched.show(add(watched.counts, exits=-1))
    assert watched.detector.state is State.SUSPECT


def test_registers_that_change_forbid_a_stall() -> None:
    watched = Watched(STUCK)
    states = [watched.show(repeat(watched.counts), {"rax": 1, "rcx": number}) for number in range(30)]
    assert State.STALLED not in states
    assert watched.detector.proofs > 5


def test_a_stall_ends_where_the_guest_goes_on() -> None:
    watched = Watched(STUCK)
    watched.show_all(repeat, 13)
    moved = add(replace(watched.counts, last_rip=R + 8, streak=1), notify_exits=1, exits=1)
    assert watched.show(moved) is State.RECOVERED
    assert watched.detector.verdict.reason == "it took a notify exit at another RIP"


def test_a_paused_vcpu_is_unknown_and_stalled_again_once_it_runs() -> None:
    watched = Watched(STUCK)
    watched.show_all(repeat, 13)
    assert list(watched.show_all(lambda counts: counts, 40))[-1] is State.UNKNOWN
    assert watched.show(repeat(watched.counts)) is State.STALLED
    assert watched.detector.verdict.episode == 1


def test_a_nested_guests_rip_is_said_to_be_its_own() -> None:
    watched = Watched(replace(STUCK, last_guest_mode=True))
    watched.show_all(repeat, 13)
    assert watched.detector.verdict.nested


def test_a_hidden_rip_is_unknown_with_its_reason() -> None:
    watched = Watched(replace(STUCK, streak=0, last_rip=0))
    states = watched.show_all(lambda counts: add(counts, notify_exits=10, exits=10), 20)
    assert set(states) == {State.UNKNOWN}
    assert "KVM does not know its RIP" in watched.detector.verdict.reason
    assert watched.detector.rip_hidden


def test_a_lost_context_is_a_state_of_its_own() -> None:
    watched = Watched(STUCK)
    lost = add(replace(STUCK, streak=0, last_rip=0), notify_exits=1, context_invalid_exits=1, exits=1)
    assert watched.show(lost) is State.CONTEXT_LOST
