"""The state machine, as sequences of what is observed and what is then known; and what holds of every sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.stalls.detector import QUIET_SECONDS, RECOVERED_SECONDS, UNREAD_SECONDS, StallDetector
from exporter.stalls.verdicts import StallRule, State, Verdict
from kvm.bpf.notify_trigger import AGAIN_SECONDS
from kvm.model import NotifyExit

R, OTHER = 0xFFFFFFFF81000000, 0xFFFFFFFF81000010
TID = 77
ALIKE = {"rax": 1, "rcx": 2, "rsp": 3, "rip": 4}


@dataclass
class Story:
    """A vCPU with a clock, a counter and registers, told step by step."""

    now: float = 1000.0
    counter: int = 0
    registers: dict[str, int] | None = field(default_factory=lambda: dict(ALIKE))
    nested: bool | None = False
    rule: StallRule = field(default_factory=StallRule)

    def __post_init__(self) -> None:
        self.detector = StallDetector(self.rule, self.now)
        self.changes: list[Verdict] = []
        self.read()

    @property
    def state(self) -> State:
        return self.detector.verdict.state

    @property
    def states(self) -> list[State]:
        return [change.state for change in self.changes]

    def wait(self, seconds: float) -> Story:
        self.now += seconds
        return self

    def read(self) -> Story:
        """Read registers and counter, which takes a moment."""
        began, self.now = self.now, self.now + 0.0001
        if self.registers is not None:
            self.changes += self.detector.observe_registers(began, self.now, self.registers, self.nested)
        self.changes += self.detector.observe_counter(began, self.now, self.counter)
        return self

    def trace(
        self, *rips: int | None, apart: float = 0.001, lost: int = 0, other_rip: bool = False, **fields: int
    ) -> Story:
        records = []
        for rip in rips:
            self.now += apart
            self.counter += 1
            records.append(make_record(self.now, rip, **fields))
        self.changes += self.detector.observe_records(self.now, records, lost=lost, other_rip=other_rip)
        return self

    def arm(self) -> Story:
        self.detector.start_window(self.now)
        return self

    def session(self, seconds: float = 1.2, rip: int = R) -> Story:
        """Trace as the agent does: arm the progress event, and read and trace every tenth of a second."""
        self.trace(rip).arm()
        for _ in range(round(seconds * 10)):
            self.trace(rip, rip).read().wait(0.1)
        self.trace(rip).read()
        self.detector.end_window()
        return self


def make_record(seconds: float, rip: int | None, qualification: int = 0, idt_vectoring: int = 0) -> NotifyExit:
    return NotifyExit(round(seconds * 1e9), TID, rip, qualification, idt_vectoring)


def test_a_vcpu_is_quiet_until_its_counter_moves() -> None:
    story = Story(counter=5)
    assert (story.state, story.read().wait(1000).read().state) == (State.QUIET, State.QUIET)
    story.counter += 1
    assert story.read().states == [State.NOTIFYING]


def test_a_trigger_is_as_good_as_a_counter() -> None:
    story = Story()
    assert [verdict.state for verdict in story.detector.observe_trigger(story.now)] == [State.NOTIFYING]
    assert story.detector.moved_seconds == story.now


def test_a_stall_takes_both_its_time_and_its_exits_and_says_what_was_found() -> None:
    story = Story(nested=True).session()
    assert story.states == [State.NOTIFYING, State.SUSPECT, State.STALLED]
    found = story.changes[-1]
    assert (found.rip, found.nested, found.registers_alike, found.episode) == (R, True, True, 1)
    assert found.exits >= 10
    assert found.since_seconds - story.changes[1].since_seconds == pytest.approx(1.0, abs=0.15)
    assert found.stuck_since_seconds == pytest.approx(1000.001, abs=0.001)


def test_a_stall_began_when_its_conditions_held_however_late_that_is_known() -> None:
    story = Story().trace(R).arm()
    for _ in range(20):
        story.trace(R).read()
    first = story.changes[1].since_seconds
    assert story.state is State.SUSPECT
    assert story.wait(4.0).read().trace(R).states[-1] is State.STALLED
    assert story.changes[-1].since_seconds == pytest.approx(first + 1.0, abs=0.01)


def test_a_stall_whose_exits_come_slowly_begins_with_the_last_that_it_takes() -> None:
    story = Story().trace(R).arm()
    for _ in range(12):
        story.wait(0.5).trace(R).read()
    assert story.state is State.STALLED
    assert story.changes[-1].since_seconds - story.changes[1].since_seconds == pytest.approx(4.5, abs=0.05)


def test_what_the_last_record_says_is_in_the_verdict() -> None:
    story = Story().trace(R, R, qualification=1, idt_vectoring=0x80000B11)
    verdict = story.detector.verdict
    assert (verdict.context_invalid, verdict.idt_vectoring, verdict.streak) == (True, 0x80000B11, 2)


@pytest.mark.parametrize(
    ("rule", "seconds"), [(StallRule(exits=1000), 5.0), (StallRule(seconds=30.0), 5.0), (StallRule(10, 1.0), 0.8)]
)
def test_one_of_the_two_is_not_enough(rule: StallRule, seconds: float) -> None:
    assert Story(rule=rule).session(seconds).state is State.SUSPECT


def test_long_session_add_up() -> None:
    story = Story(rule=StallRule(seconds=6.0))
    for _ in range(2):
        assert story.session(2.5).wait(1.0).states[-1:] == [State.SUSPECT]
    assert story.session(2.5).state is State.STALLED


def test_short_session_do_not_add_up() -> None:
    """A guest that leaves its RIP each second may be there whenever a session is shorter than that."""
    story = Story()
    for _ in range(20):
        story.session(0.9).wait(1.0)
    assert story.states == [State.NOTIFYING, State.SUSPECT]


def test_records_of_two_session_are_no_pair() -> None:
    story = Story()
    for _ in range(20):
        story.detector.begin_session()
        story.trace(R).read().wait(1.0)
    assert (story.states, story.detector.same_rip_exits) == ([State.NOTIFYING], 0)
    story.detector.begin_session()
    assert story.trace(OTHER).states == [State.NOTIFYING]  # progress, but not in the time of this session
    assert story.detector.proofs == 0


def test_exits_that_nobody_watched_do_not_count() -> None:
    """Between two sessions the guest may do anything and come back."""
    story = Story().session(0.2)
    for _ in range(20):
        story.counter += 1000
        story.wait(1.0).read().trace(R, R).read()
    assert story.state is State.SUSPECT


def test_a_span_without_a_record_at_its_end_proves_nothing_of_its_last_exits() -> None:
    story = Story().trace(R).arm().trace(R, R).read().wait(2.0)
    story.counter += 100
    story.read().read()
    assert (story.states[-1:], story.detector.verdict.exits) == ([State.SUSPECT], 2)
    early = make_record(story.now - 1.0, R)  # it says nothing of the exits that were counted after it
    story.changes += story.detector.observe_records(story.now, [early])
    assert story.detector.verdict.exits == 3
    assert story.trace(R).detector.verdict.exits >= 100
    assert story.state is State.STALLED


def test_a_reading_from_before_the_first_record_counts_no_exits() -> None:
    """Between that reading and the record the exits may have been anywhere."""
    story = Story().trace(R, R).arm().wait(0.1)
    began = story.now
    story.trace(R)
    story.changes += story.detector.observe_counter(began, story.now + 0.01, story.counter)
    story.counter += 100
    story.wait(1.5).read().trace(R)
    assert (story.state, story.detector.verdict.exits) == (State.SUSPECT, 2)


def test_what_was_lost_interrupts_what_was_watched() -> None:
    story = Story(rule=StallRule(exits=2)).trace(R, R).arm().trace(R).read()
    story.trace(lost=3).wait(2.0).trace(R).read().trace(R).read()
    assert (story.state, story.detector.verdict.exits) == (State.SUSPECT, 3)


@pytest.mark.parametrize("sign", ["event B", "another RIP"])
def test_what_proves_progress_comes_before_what_came_with_it(sign: str) -> None:
    """The last record makes the time up, but the guest has been elsewhere."""
    story = Story().trace(R).arm()
    for _ in range(9):
        story.wait(0.1).trace(R, R)
    assert story.state is State.SUSPECT
    story.wait(0.2).trace(R, *([OTHER] if sign == "another RIP" else []), R, other_rip=True)
    assert State.STALLED not in story.states
    assert story.states[-1] is State.PROGRESSING


def test_a_paused_vcpu_that_was_elsewhere_is_not_stuck_again() -> None:
    story = Story().session().wait(10).read().arm().trace(R, other_rip=True)
    assert story.states[-3:] == [State.STALLED, State.UNKNOWN, State.RECOVERED]


def test_records_from_before_the_watch_are_not_watched() -> None:
    story = Story().trace(R)
    early = [make_record(story.now + step / 1000, R) for step in range(1, 50)]
    story.wait(2.0).arm()
    story.changes += story.detector.observe_records(story.now, early)
    story.counter += 50
    story.read().wait(2.0).read()
    assert story.state is State.SUSPECT
    assert story.detector.verdict.exits == 0


ENDS: dict[str, Callable[[Story], Story]] = {
    "another RIP": lambda story: story.trace(OTHER),
    "another RIP among lost records": lambda story: story.trace(OTHER, lost=3),
    "event B": lambda story: story.trace(other_rip=True),
    "event B with records at the RIP": lambda story: story.trace(R, R, other_rip=True),
    "registers": lambda story: change_register(story, "rcx").read(),
}


def change_register(story: Story, name: str) -> Story:
    assert story.registers is not None
    story.registers[name] += 1
    return story


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_each_sign_of_life_ends_a_suspicion_and_a_stall(end: Callable[[Story], Story]) -> None:
    story = Story().session(0.5)
    assert end(story).states[-1] is State.PROGRESSING
    assert end(Story().session(0.5)).detector.verdict.rip is None
    story = Story().session()
    assert end(story).states[-2:] == [State.STALLED, State.RECOVERED]
    assert story.changes[-1].rip == R
    assert story.changes[-1].reason


@pytest.mark.parametrize("name", ["rip", "rsp"])
def test_registers_that_are_stale_on_vmx_are_not_compared(name: str) -> None:
    assert change_register(Story().session(), name).read().state is State.STALLED


def test_a_rep_that_counts_down_is_never_stalled() -> None:
    story = Story()
    for _ in range(600):
        change_register(story.trace(R, R).arm().trace(R), "rcx").read().wait(0.1)
    assert State.STALLED not in story.states


def test_a_slow_rep_is_never_stalled_although_it_is_often_suspect() -> None:
    story = Story(rule=StallRule(exits=2, seconds=2.0)).trace(R).arm()
    for second in range(120):
        story.trace(R).read().wait(0.5).trace(R).read().wait(0.5)
        if second % 2:
            change_register(story, "rcx")
        story.arm()
    assert State.SUSPECT in story.states
    assert State.STALLED not in story.states


def test_registers_that_were_read_before_it_came_here_are_not_compared() -> None:
    story = Story().trace(R, R)
    early = story.detector.observe_registers(story.now - 5, story.now, {"rax": 99}, nested=False)
    assert (early, story.detector.verdict.registers_alike) == ((), None)
    assert story.session().state is State.STALLED


def test_without_registers_the_verdict_says_so() -> None:
    story = Story(registers=None).session()
    assert (story.state, story.detector.verdict.registers_alike) == (State.STALLED, None)


def test_alternating_rips_are_progress() -> None:
    story = Story()
    for _ in range(200):
        story.trace(R, OTHER).arm().read().wait(0.1)
    assert story.states == [State.NOTIFYING, State.PROGRESSING]


def test_rips_in_pairs_are_progress_too() -> None:
    story = Story()
    for _ in range(200):
        story.trace(R, R, OTHER, OTHER).arm().read().wait(0.1)
    assert State.STALLED not in story.states


def test_a_hidden_rip_is_unknown_and_no_pair() -> None:
    story = Story()
    for _ in range(50):
        story.trace(None, None).arm().trace(None).read().wait(0.1)
    assert (story.states, story.detector.rip_hidden) == ([State.UNKNOWN], True)
    assert (story.detector.traced_exits, story.detector.same_rip_exits) == (150, 0)


def test_a_rip_of_0_is_one_like_any_other() -> None:
    story = Story().session(rip=0)
    assert story.states == [State.NOTIFYING, State.SUSPECT, State.STALLED]
    assert story.detector.verdict.rip == 0


def test_an_exit_out_of_an_enclave_between_two_at_one_rip_breaks_the_row() -> None:
    story = Story()
    for _ in range(50):
        story.trace(R, None, R, None).arm().read().wait(0.1)
    assert State.SUSPECT not in story.states
    story = Story().trace(R, R).arm()
    for _ in range(50):
        story.trace(R, None).read().wait(0.1)
    assert State.STALLED not in story.states


def test_what_cannot_be_traced_is_unknown_with_the_reason_until_it_is_quiet() -> None:
    story = Story()
    story.counter += 1
    story.read().changes += story.detector.observe_hidden(story.now, "it is a TD")
    assert story.states == [State.NOTIFYING, State.UNKNOWN]
    verdict = story.detector.verdict
    assert (verdict.state, verdict.reason, story.detector.rip_hidden) == (State.UNKNOWN, "it is a TD", True)
    story.counter += 1
    assert story.read().state is State.UNKNOWN
    assert story.wait(100).read().state is State.QUIET


def test_lost_records_make_no_pair_and_no_stall() -> None:
    story = Story()
    for _ in range(50):
        story.trace(R, R, lost=1).arm().trace(R, lost=1).read().wait(0.1)
    assert story.states == [State.NOTIFYING]


def test_a_paused_vcpu_is_unknown_and_not_recovered_and_stuck_again_without_a_second_stall() -> None:
    story = Story().session()
    for _ in range(100):
        story.wait(1.0).read()
    assert story.states[-2:] == [State.STALLED, State.UNKNOWN]
    assert story.detector.verdict.rip == R
    story.trace(R).read()
    assert (story.state, story.detector.verdict.episode) == (State.STALLED, 1)


def test_a_paused_vcpu_that_goes_on_elsewhere_has_recovered() -> None:
    story = Story().session().wait(10).read().wait(10).read()
    assert story.trace(OTHER).states[-2:] == [State.UNKNOWN, State.RECOVERED]


def test_a_slow_stall_is_not_taken_for_a_pause() -> None:
    story = Story(rule=StallRule(exits=2)).trace(R).arm()
    for _ in range(10):
        story.wait(4.0).trace(R).read()
    assert story.state is State.STALLED
    story.wait(8.0).read()
    assert story.state is State.STALLED


def test_a_suspect_that_takes_no_more_exits_is_quiet_and_begins_afresh() -> None:
    story = Story().session(0.5)
    story.wait(QUIET_SECONDS + 1).read()
    assert (story.state, story.detector.suspected) == (State.QUIET, False)
    assert story.trace(R).states[-1] is State.NOTIFYING


def test_a_recovery_is_seen_for_a_while_and_then_what_comes() -> None:
    story = Story().session().trace(OTHER).trace(R, other_rip=True)
    story.counter += 1
    assert story.wait(1).read().state is State.RECOVERED
    story.counter += 1
    assert story.wait(RECOVERED_SECONDS).read().state is State.NOTIFYING
    assert story.detector.verdict.rip is None


def test_a_second_stall_is_a_second_episode() -> None:
    story = Story().session().trace(OTHER).session()
    assert story.states[-4:] == [State.STALLED, State.RECOVERED, State.SUSPECT, State.STALLED]
    assert story.changes[-1].episode == 2


def test_a_counter_that_falls_was_reset_and_counts_nothing() -> None:
    story = Story(counter=1000, rule=StallRule(exits=2)).trace(R).arm().trace(R, R).read()
    story.counter = 3
    story.wait(2.0).read().trace(R)
    assert (story.state, story.detector.verdict.exits) == (State.SUSPECT, 3)


def test_an_older_reading_that_is_handed_over_late_is_no_reset() -> None:
    story = Story(counter=1000).trace(R).arm().trace(R, R).read()
    known = (story.detector.notify_exits, story.detector.moved_seconds, story.detector.interval_seconds)
    assert story.detector.observe_counter(story.now - 0.5, story.now + 0.1, 990) == ()
    assert (story.detector.notify_exits, story.detector.moved_seconds, story.detector.interval_seconds) == known
    for _ in range(12):
        story.wait(0.1).trace(R).read()
    assert story.state is State.STALLED


def test_registers_that_were_read_once_prove_nothing() -> None:
    """They must have been alike for as long as a stall takes: a REP moves them in the meantime."""
    story = Story(registers=None).trace(R).arm()
    for _ in range(8):
        story.wait(0.1).trace(R, R).read()
    story.registers = dict(ALIKE)
    story.read().wait(0.3).trace(R, R).read().trace(R)
    assert story.state is State.SUSPECT
    assert change_register(story, "rcx").read().state is State.PROGRESSING


def test_a_stall_whose_counter_cannot_be_read_any_more_is_unknown() -> None:
    story = Story().session()
    told = story.detector.observe_unread(story.now + UNREAD_SECONDS - 0.1)
    assert (list(told), story.state) == ([], State.STALLED)
    story.wait(UNREAD_SECONDS + 0.1).changes += story.detector.observe_unread(story.now)
    assert (story.state, story.detector.verdict.reason) == (State.UNKNOWN, "its counter cannot be read")
    assert story.trace(R).state is State.STALLED
    story.changes += story.detector.observe_unread(story.now + 1.0)  # its trace can be read
    assert story.state is State.STALLED
    story.changes += story.detector.observe_trigger(story.now + 9.0)
    story.changes += story.detector.observe_unread(story.now + 9.0 + AGAIN_SECONDS)
    assert story.state is State.STALLED


@pytest.mark.parametrize(
    ("percent", "still_seconds", "words"),
    [
        (None, 3.0, "its counter stands still: it may be paused"),
        (0.0, 1.0, "its counter stands still and its thread uses 0 % of a CPU: it is paused or throttled"),
        (97.0, 3.0, "its counter stands still but its thread uses 97 % of a CPU: it is not paused"),
    ],
)
def test_cpu_time_tells_a_paused_vcpu_from_one_that_runs(
    percent: float | None, still_seconds: float, words: str
) -> None:
    story = Story().session()
    assert story.state is State.STALLED
    moved = story.now
    for _ in range(10 * 5):
        story.wait(0.1)
        if percent is not None:
            story.detector.observe_cpu_time(story.now, 50.0 + percent / 100 * (story.now - moved))
        story.read()
        if story.state is not State.STALLED:
            break
    assert story.now - moved == pytest.approx(still_seconds, abs=0.15)
    found = story.detector.verdict
    assert (found.state, found.reason) == (State.UNKNOWN, words)
    assert found.cpu_percent == (None if percent is None else pytest.approx(percent))


def test_a_stall_says_how_much_of_a_cpu_its_thread_uses_and_is_called_where_that_is_little() -> None:
    """A cgroup may throttle it: CPU time is evidence for who reads the verdict, and no condition."""
    story = Story().trace(R).arm()
    for _ in range(12):
        story.detector.observe_cpu_time(story.now, 0.02 * story.now)
        story.trace(R, R).read().wait(0.1)
    assert (story.state, round(story.changes[-1].cpu_percent or 0)) == (State.STALLED, 2)


def test_a_lost_context_is_not_overwritten_by_a_rip_that_nobody_knows() -> None:
    """KVM does not know the RIP of such an exit either, and says so at every reading after it."""
    story = Story().session()
    story.changes += story.detector.observe_context_invalid(story.now)
    story.changes += story.detector.observe_hidden(story.now + 1.0, "its registers are protected")
    assert (story.state, story.changes[-1].state) == (State.CONTEXT_LOST, State.CONTEXT_LOST)


@pytest.mark.parametrize("before", ["quiet", "notifying", "suspect", "stalled"])
def test_a_lost_context_is_known_at_once_and_until_the_vcpu_runs_again(before: str) -> None:
    story = Story()
    if before == "notifying":
        story.trace(R)
    elif before in ("suspect", "stalled"):
        story.session(0.5 if before == "suspect" else 1.2)
    story.counter += 1
    story.changes += story.detector.observe_context_invalid(story.now)
    story.changes += story.detector.observe_exits(story.now, 1000)
    for _ in range(200):
        story.wait(1.0).read()
        story.changes += story.detector.observe_exits(story.now, 1000)
        story.changes += story.detector.observe_unread(story.now + 100.0)
    assert (story.state, story.changes[-1].state) == (State.CONTEXT_LOST, State.CONTEXT_LOST)
    assert (story.detector.suspected, story.detector.verdict.rip) == (False, None)
    story.changes += story.detector.observe_exits(story.now, 1001)
    assert story.state is State.NOTIFYING
    assert story.session().state is State.STALLED


def test_a_nested_guest_that_may_be_stuck_is_not_called_progress_without_saying_so() -> None:
    """Its hypervisor's timer tick exits at other RIPs: nearly all records at one RIP, and the vCPU progresses."""
    story = Story(nested=True)
    for _ in range(20):
        story.trace(*[R] * 50, OTHER).arm().read().wait(0.1)
    found = story.detector.verdict
    assert (found.state, found.nested_unjudged) == (State.PROGRESSING, True)
    assert found.reason.endswith("; whether its nested guest is stuck cannot be told")
    plain = Story(nested=False).trace(R, R, OTHER).read().detector.verdict
    assert (plain.state, plain.nested_unjudged) == (State.PROGRESSING, False)
    story.wait(2 * QUIET_SECONDS).read()
    assert (story.state, story.detector.verdict.nested_unjudged) == (State.QUIET, False)


def test_cpu_time_of_before_a_suspicion_is_no_evidence() -> None:
    story = Story()
    for _ in range(3):
        story.detector.observe_cpu_time(story.now, 0.5 * story.now)
        story.wait(1.0)
    assert story.trace(R, R).detector.verdict.cpu_percent is None


def test_what_was_known_of_a_vcpu_that_cannot_be_read_is_forgotten_in_time() -> None:
    story = Story()
    assert list(story.detector.observe_unread(story.now + 1000)) == []
    story.session(0.5).wait(QUIET_SECONDS - 1).changes += story.detector.observe_unread(story.now)
    assert story.state is State.SUSPECT
    story.wait(2).changes += story.detector.observe_unread(story.now)
    assert (story.state, story.detector.suspected) == (State.UNKNOWN, False)
    story.counter += 1
    assert story.read().state is State.NOTIFYING


@pytest.mark.parametrize(
    ("apart", "words"),
    [
        (0.1, "it took two notify exits in a row at one RIP"),
        (
            1.0,
            "it took two notify exits in a row at one RIP, slowly: it takes several trace sessions to see 10 of them",
        ),
        (3.0, "it took two notify exits in a row at one RIP, too slowly to be judged: one in some 3.0 s"),
    ],
)
def test_a_suspicion_says_that_exits_come_too_slowly(apart: float, words: str) -> None:
    assert Story().trace(R, R, apart=apart).detector.verdict.reason == words


def test_exits_that_are_too_slow_for_a_suspicion_say_so_too() -> None:
    story = Story()
    for _ in range(3):
        story.counter += 1
        story.read().wait(1.0).read().wait(6.0).read()
    assert story.state is State.NOTIFYING
    assert story.detector.verdict.reason == "it takes notify exits, too slowly to be judged: one in some 7.0 s"


def test_the_shortest_time_between_two_exits_at_one_rip() -> None:
    story = Story().trace(R, R, apart=0.25).trace(OTHER, apart=0.001).trace(OTHER, apart=0.125)
    assert story.detector.shortest_seconds == pytest.approx(0.125)


def test_late_records_make_no_pair_and_those_from_before_a_suspicion_do_not_end_it() -> None:
    story = Story().trace(R)
    late = make_record(story.now - 0.5, R)
    story.changes += story.detector.observe_records(story.now, [late])
    assert story.detector.same_rip_exits == 0
    story = Story().trace(R, R)
    story.changes += story.detector.observe_records(story.now, [make_record(story.now - 0.5, OTHER)])
    assert story.state is State.SUSPECT


TICK = 0.05
# What the guest does for some ticks, whether B is watched for, and what becomes of the records meanwhile.
Deed = tuple[str, int, bool, str]
DEEDS: st.SearchStrategy[list[Deed]] = st.lists(
    st.tuples(
        st.sampled_from(["stuck", "stuck", "stuck", "elsewhere", "rep", "other exits", "paused", "hidden"]),
        st.integers(1, 30),
        st.sampled_from([True, True, False]),
        st.sampled_from(["kept", "kept", "lost", "late", "unordered"]),
    ),
    max_size=25,
)


class Guest:
    """A guest of which the truth is known, and how long and for how many exits it has been stuck at R at most.

    ``seconds`` and ``exits`` begin anew with each sign of life that could be seen.
    """

    def __init__(self, rule: StallRule) -> None:
        self.story = Story(rule=rule)
        self.seconds, self.exits = 0.0, 0
        self.held: list[NotifyExit] = []
        self.changes = 0
        self.story.detector.on_change = self.note_change
        self.told: dict[int, tuple[object, ...]] = {}
        self.watched_rip: int | None = None

    def note_change(self) -> None:
        self.changes += 1

    def live(self, behaviour: str, watched: bool, fate: str) -> None:
        """Pass one tick."""
        story, progress = self.story.wait(TICK), self.story.detector
        records, visible = [], False
        if behaviour != "paused":
            story.counter += 2
            rips = {"elsewhere": (OTHER, OTHER + 2), "hidden": (None, None)}.get(behaviour, (R, R))
            records = [make_record(story.now - TICK * (1 - number) / 2, rip) for number, rip in enumerate(rips)]
        if behaviour in ("stuck", "paused"):
            self.seconds += TICK
            self.exits += 2 * (behaviour == "stuck")
        if behaviour == "rep":
            change_register(story, "rcx")
        lost = len(records) if fate == "lost" else 0
        if fate == "lost":
            records = []
        elif fate == "late":
            self.held, records = self.held + records, []
        else:
            records = [*records, *self.held] if fate == "kept" else [*reversed(records), *self.held]
            self.held = []
        active = behaviour not in ("stuck", "rep", "paused")
        other_rip = self.watched_rip is not None and (active or (self.watched_rip != R and behaviour != "paused"))
        seen = {record.rip for record in records} - {None}
        visible = other_rip or len(seen) > 1 or behaviour == "rep"
        before = len(story.changes)
        story.changes += progress.observe_records(story.now, records, lost=lost, other_rip=other_rip)
        wanted = progress.rip if watched else None
        if wanted is not None and (wanted != self.watched_rip or not progress.observing):
            progress.start_window(story.now)
        elif wanted is None:
            progress.end_window()
        self.watched_rip = wanted
        story.read()
        self.check_changes()
        self.judge(story.changes[before:], visible, behaviour, other_rip)

    def check_changes(self) -> None:
        """What metrics tell is the same until it is said to have changed."""
        detector = self.story.detector
        verdict = detector.verdict
        stuck_since = verdict.stuck_since_seconds if verdict.state is State.STALLED else None
        told = (verdict.state, stuck_since, detector.traced_exits, detector.same_rip_exits, detector.rip_hidden)
        assert self.told.setdefault(self.changes, told) == told

    def judge(self, changes: Sequence[Verdict], visible: bool, behaviour: str, other_rip: bool) -> None:
        rule = self.story.rule
        for change in changes:
            if change.state is State.STALLED and change.reason.startswith("it took"):
                assert self.exits >= rule.exits
                assert self.seconds >= rule.seconds - 1e-6
                assert change.rip == R
                assert not other_rip
            if change.state is State.RECOVERED:
                assert behaviour != "stuck" or self.held == []
        if visible:
            self.seconds, self.exits = 0.0, 0
            assert self.story.state not in (State.STALLED,)


@given(DEEDS, st.sampled_from([StallRule(), StallRule(exits=2, seconds=0.2), StallRule(exits=40, seconds=0.5)]))
def test_whatever_happens_a_stall_takes_its_exits_and_its_time(deeds: list[Deed], rule: StallRule) -> None:
    guest = Guest(rule)
    for behaviour, ticks, watched, fate in deeds:
        for _ in range(ticks):
            guest.live(behaviour, watched, fate)


@given(DEEDS)
def test_whatever_has_happened_a_stuck_vcpu_is_found_and_silence_is_no_recovery(deeds: list[Deed]) -> None:
    guest = Guest(StallRule())
    for behaviour, ticks, watched, fate in deeds:
        for _ in range(ticks):
            guest.live(behaviour, watched, fate)
    for _ in range(60):
        guest.live("stuck", True, "kept")
    assert guest.story.states[-1:] == [State.STALLED]
    for _ in range(100):
        guest.live("paused", False, "kept")
    assert guest.story.state is State.UNKNOWN


@given(st.lists(st.tuples(st.sampled_from([R, OTHER]), st.integers(0, 10**7)), min_size=2), st.randoms())
def test_the_order_of_delivery_within_a_batch_does_not_matter(exits: list[tuple[int, int]], random: object) -> None:
    now, records = 0, []
    for rip, apart in exits:
        now += apart + 1
        records.append(NotifyExit(now, TID, rip, 0, 0))
    pairs = sum(before[0] == after[0] for before, after in itertools.pairwise(exits))
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = StallDetector(StallRule(), 0.0), StallDetector(StallRule(), 0.0)
    assert one.observe_records(1.0, records) == other.observe_records(1.0, shuffled)
    assert one.same_rip_exits == other.same_rip_exits == pairs
