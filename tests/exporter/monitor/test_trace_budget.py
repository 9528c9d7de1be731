"""Who may be traced: at once, in which order, for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.monitor.trace_budget import LONGEST_ROTATION_SECONDS, SHORTEST_ROTATION_SECONDS, Limits, TraceBudget
from exporter.stalls.interval import SESSION_SECONDS
from kvm.model import VcpuKey, VmKey

NOW = 0.0


def make_key(vm: int, vcpu: int = 0) -> VcpuKey:
    return VcpuKey(VmKey(vm, 1, 9), vcpu)


def find_names(begun: list[tuple[VcpuKey, float]]) -> list[tuple[int, int]]:
    return [(key.vm.pid, key.vcpu_id) for key, _ in begun]


def test_urgent_vcpus_go_first_also_those_that_have_waited_already() -> None:
    budget = TraceBudget(Limits(host=2, vm=2))
    for vm in range(1, 6):
        budget.want(make_key(vm), NOW)
    budget.want(make_key(6), NOW, urgent=True)
    budget.want(make_key(4), NOW, urgent=True)
    budget.want(make_key(4), NOW)
    assert find_names(budget.start(0.0)) == [(6, 0), (4, 0)]
    budget.end(make_key(6), 1.0)
    budget.end(make_key(4), 1.0)
    budget.forget(make_key(1).vm)
    assert find_names(budget.start(1.0)) == [(2, 0), (3, 0)]
    assert budget.deferred == 4


def test_urgent_vcpus_of_one_vm_leave_room_for_others() -> None:
    budget = TraceBudget(Limits(host=4, vm=2))
    for vcpu in range(4):
        budget.want(make_key(1, vcpu), NOW, urgent=True)
    budget.want(make_key(2), NOW)
    budget.want(make_key(3), NOW, urgent=True)
    assert find_names(budget.start(0.0)) == [(1, 0), (3, 0), (1, 1), (2, 0)]


def test_vms_take_turns() -> None:
    budget = TraceBudget(Limits(host=4, vm=4))
    for vcpu in range(4):
        budget.want(make_key(1, vcpu), NOW)
    for vm in (2, 3):
        budget.want(make_key(vm), NOW)
    assert find_names(budget.start(0.0)) == [(1, 0), (2, 0), (3, 0), (1, 1)]
    assert budget.deferred == 2
    budget.end(make_key(2), 1.0)
    budget.want(make_key(2), NOW)
    assert find_names(budget.start(1.0)) == [(1, 2)]


def test_a_vm_has_four_at_once_and_the_host_sixteen() -> None:
    budget = TraceBudget(Limits())
    for vm in range(10):
        for vcpu in range(8):
            budget.want(make_key(vm, vcpu), NOW)
    begun = find_names(budget.start(0.0))
    assert len(begun) == budget.running == 16
    assert budget.deferred == 64
    assert budget.start(1.0) == []
    assert budget.deferred == 64
    one = TraceBudget(Limits())
    for vcpu in range(8):
        one.want(make_key(1, vcpu), NOW)
    assert len(one.start(0.0)) == 4


def test_what_is_wanted_twice_or_under_way_is_one_look() -> None:
    budget = TraceBudget(Limits())
    budget.want(make_key(1), NOW)
    budget.want(make_key(1), NOW)
    assert len(budget.start(0.0)) == 1
    budget.want(make_key(1), NOW)
    assert budget.start(0.0) == []


def trace(budget: TraceBudget, now: float, seconds: float, least: float = 0.0, part: float = 1.0) -> float | None:
    """Trace for at most so long; returns how long it was, None if it had to wait."""
    budget.want(make_key(1), now, least, part)
    begun = budget.start(now)
    if not begun:
        return None
    taken = min(seconds, begun[0][1])
    budget.end(make_key(1), now + taken)
    return taken


def test_the_first_session_is_free_and_then_it_is_a_tenth_of_a_minute() -> None:
    budget = TraceBudget(Limits())
    assert trace(budget, 0.0, 9.0) == SESSION_SECONDS
    assert trace(budget, 10.0, 4.0) == 4.0
    assert trace(budget, 20.0, 9.0) == pytest.approx(2.0)
    assert trace(budget, 30.0, 9.0) is None
    assert trace(budget, 31.0, 9.0) is None
    assert budget.deferred == 1
    assert trace(budget, 75.5, 9.0) == pytest.approx(4.0)


def test_something_is_left_for_the_session_that_may_use_more_of_the_share() -> None:
    budget = TraceBudget(Limits())
    assert trace(budget, 0.0, 9.0, part=0.5) == SESSION_SECONDS
    assert trace(budget, 10.0, 9.0, part=0.5) == pytest.approx(3.0)
    assert trace(budget, 20.0, 9.0, part=0.5) is None
    assert trace(budget, 21.0, 2.0, part=0.9) == pytest.approx(2.0)
    assert trace(budget, 30.0, 1.0, part=0.5) is None
    assert trace(budget, 31.0, 9.0, part=1.0) == pytest.approx(1.0)
    assert trace(budget, 32.0, 1.0, part=1.0) is None


def test_who_has_used_up_its_share_is_told_when_it_is_free_again() -> None:
    budget = TraceBudget(Limits())
    assert [trace(budget, begin, 2.0) for begin in (0.0, 10.0, 20.0, 30.0)] == [2.0, 2.0, 2.0, 2.0]
    assert budget.want(make_key(1), 40.0, 1.5) == pytest.approx(71.5)
    assert budget.want(make_key(1), 40.0, 3.0) == pytest.approx(81.0)  # 2 s from the first, 1 s from the second
    assert budget.want(make_key(1), 71.0, 3.0) == pytest.approx(81.0)
    assert budget.start(71.0) == []
    assert budget.want(make_key(1), 81.0, 3.0) == 81.0
    assert budget.start(81.0)[0][1] == pytest.approx(3.0)
    assert budget.deferred == 1


def test_one_waits_for_what_it_asked_for_and_for_no_more() -> None:
    budget = TraceBudget(Limits(host=1))
    first, second = make_key(1), make_key(2)
    budget.want(first, 0.0)
    assert [key for key, _ in budget.start(0.0)] == [first]
    assert not budget.is_waiting(first, 0.0, urgent=False)  # it is under way
    budget.want(second, 0.0, part=0.5)
    asked = [(0.4, False), (0.5, False), (0.6, False), (0.5, True)]
    assert [budget.is_waiting(second, part, urgent=urgent) for part, urgent in asked] == [True, True, False, False]
    budget.want(second, 0.0, part=0.6, urgent=True)
    assert all(budget.is_waiting(second, part, urgent=urgent) for part, urgent in asked)
    budget.end(first, 1.0)
    budget.start(1.0)
    assert not budget.is_waiting(second, 0.0, urgent=False)


def test_one_that_was_dropped_and_waits_again_is_counted_again() -> None:
    budget = TraceBudget(Limits(host=1))
    first, second = make_key(1), make_key(2)
    budget.want(first, 0.0)
    budget.start(0.0)
    for counted in (1, 2):
        budget.want(second, 0.0)
        budget.want(second, 0.0)
        assert budget.deferred == counted
        budget.drop(second)
    budget.end(first, 1.0)
    assert budget.start(1.0) == []


def test_a_session_that_waits_for_room_may_be_asked_for_again_with_more_of_the_share() -> None:
    budget = TraceBudget(Limits(host=1))
    assert trace(budget, 0.0, 0.2) == 0.2
    budget.want(make_key(2), 5.0)
    budget.start(5.0)
    for part in (0.5, 1.0, 0.5):
        assert budget.want(make_key(1), 6.0, part=part) == 6.0
    assert budget.start(6.0) == []
    budget.end(make_key(2), 7.0)
    assert budget.start(7.0) == [(make_key(1), 5.0)]
    assert budget.deferred == 1


def test_vcpus_that_go_on_take_turns() -> None:
    budget = TraceBudget(Limits())
    assert budget.find_slot(100.0) == 100.0 + SHORTEST_ROTATION_SECONDS
    turns = [budget.find_slot(100.0) for _ in range(1000)]
    assert turns[3] == pytest.approx(104.0)
    assert turns[-1] == 100.0 + LONGEST_ROTATION_SECONDS
    assert budget.find_slot(200.0) == 200.0 + SHORTEST_ROTATION_SECONDS


def test_what_it_costs_to_ask_does_not_grow_with_those_that_wait() -> None:
    """Every notify exit of every vCPU may ask; so nobody who waits is asked about again."""
    budget = TraceBudget(Limits())
    keys = [make_key(vm, vcpu) for vm in range(100) for vcpu in range(100)]
    asked = 0

    class Watched(TraceBudget):
        def _find_seconds(self, key: VcpuKey, now: float, part: float) -> float:
            nonlocal asked
            asked += 1
            return super()._find_seconds(key, now, part)

    budget = Watched(Limits())
    for key in keys:
        budget.want(key, NOW)
        budget.start(NOW)
    assert budget.deferred == len(keys) - 16
    asked = 0
    for key in keys:
        budget.want(key, NOW)
        assert budget.start(NOW) == []
    assert asked == 0


def test_a_slow_vcpu_waits_until_a_session_is_long_enough() -> None:
    budget = TraceBudget(Limits())
    assert (trace(budget, 0.0, 5.0), trace(budget, 10.0, 3.0)) == (5.0, 3.0)
    assert trace(budget, 20.0, 5.0, least=4.0) is None
    assert trace(budget, 74.0, 5.0) == pytest.approx(5.0)


def test_no_vcpu_is_too_slow_to_be_traced_again() -> None:
    budget = TraceBudget(Limits())
    assert trace(budget, 0.0, 5.0, least=100.0) == 5.0
    assert trace(budget, 10.0, 5.0, least=100.0, part=0.8) == pytest.approx(4.8)


def test_a_vm_that_has_ended_is_forgotten() -> None:
    budget = TraceBudget(Limits())
    budget.want(make_key(1), NOW)
    budget.want(make_key(2), NOW)
    budget.forget(make_key(1).vm)
    assert find_names(budget.start(0.0)) == [(2, 0)]
    budget.end(make_key(1), 0.0)


def test_nothing_is_left_of_vms_that_have_ended() -> None:
    budget = TraceBudget(Limits(host=2))
    empty = {name: value for name, value in vars(budget).items() if name.startswith("_")}
    empty = {name: type(value)(value) for name, value in empty.items() if isinstance(value, (dict, set))}
    for number in range(1000):
        key = make_key(number)
        for vcpu in range(4):
            budget.want(make_key(number, vcpu), float(number))
        budget.start(number)
        budget.forget(key.vm)
        for vcpu in range(4):
            budget.end(make_key(number, vcpu), number + 1.0)
    assert {name: getattr(budget, name) for name in empty} == empty


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 5.0), st.floats(0.1, 1.0)), max_size=60))
def test_no_minute_has_more_than_its_share(asked: list[tuple[float, float, float]]) -> None:
    budget, now, sessions = TraceBudget(Limits()), 0.0, []
    for pause, seconds, part in asked:
        now += pause
        taken = trace(budget, now, seconds, part=part)
        if taken is not None:
            sessions.append((now, now + taken))
            now += taken
    for _, end in sessions[1:]:
        used = sum(max(0.0, min(ended, end) - max(began, end - 60.0)) for began, ended in sessions[1:])
        assert used <= 6.0 + 1e-6


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 5.0)), min_size=1, max_size=30), st.floats(0.2, 5.0))
def test_a_share_is_free_when_it_was_said_to_be_and_not_before(asked: list[tuple[float, float]], least: float) -> None:
    budget, now = TraceBudget(Limits()), 0.0
    for pause, seconds in asked:
        now += pause
        now += trace(budget, now, seconds) or 0.0
    free = budget.want(make_key(1), now, least)
    if free > now:
        assert budget.want(make_key(1), max(now, free - 0.01), least) == pytest.approx(free)
    assert budget.want(make_key(1), free, least) == free
    assert budget.start(free)[0][1] >= least - 1e-5
