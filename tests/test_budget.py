"""Who may be looked at: at once, in which order, for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.budget import LOOK_SECONDS, Limits, LookBudget, VcpuKey
from kvm.model import VmKey


def make_key(vm: int, vcpu: int = 0) -> VcpuKey:
    return VcpuKey(VmKey(vm, 1, 9), vcpu)


def find_names(begun: list[tuple[VcpuKey, float]]) -> list[tuple[int, int]]:
    return [(key.vm.pid, key.vcpu_id) for key, _ in begun]


def test_vms_take_turns() -> None:
    budget = LookBudget(Limits(host=4, vm=4))
    for vcpu in range(4):
        budget.want(make_key(1, vcpu))
    for vm in (2, 3):
        budget.want(make_key(vm))
    assert find_names(budget.start(0.0)) == [(1, 0), (2, 0), (3, 0), (1, 1)]
    assert budget.exhausted == 2
    budget.end(make_key(2), 1.0)
    budget.want(make_key(2))
    assert find_names(budget.start(1.0)) == [(1, 2)]


def test_a_vm_has_four_at_once_and_the_host_sixteen() -> None:
    budget = LookBudget(Limits())
    for vm in range(10):
        for vcpu in range(8):
            budget.want(make_key(vm, vcpu))
    begun = find_names(budget.start(0.0))
    assert len(begun) == budget.running == 16
    assert budget.exhausted == 64
    assert budget.start(1.0) == []
    assert budget.exhausted == 64
    one = LookBudget(Limits())
    for vcpu in range(8):
        one.want(make_key(1, vcpu))
    assert len(one.start(0.0)) == 4


def test_what_is_wanted_twice_or_under_way_is_one_look() -> None:
    budget = LookBudget(Limits())
    budget.want(make_key(1))
    budget.want(make_key(1))
    assert len(budget.start(0.0)) == 1
    budget.want(make_key(1))
    assert budget.start(0.0) == []


def look(
    budget: LookBudget, now: float, seconds: float, least: float = 0.0, from_reserve: bool = False
) -> float | None:
    """Look for at most so long; returns how long it was, None if it had to wait."""
    budget.want(make_key(1), least, from_reserve=from_reserve)
    begun = budget.start(now)
    if not begun:
        return None
    taken = min(seconds, begun[0][1])
    budget.end(make_key(1), now + taken)
    return taken


def test_the_first_look_is_free_and_then_it_is_a_tenth_of_a_minute() -> None:
    budget = LookBudget(Limits())
    assert look(budget, 0.0, 9.0) == LOOK_SECONDS
    assert look(budget, 10.0, 4.0) == 4.0
    assert look(budget, 20.0, 9.0) == pytest.approx(0.8)
    assert look(budget, 30.0, 9.0) is None
    assert budget.exhausted == 1
    assert look(budget, 75.5, 9.0) == pytest.approx(4.0)


def test_a_fifth_of_it_is_kept_for_signs_of_life() -> None:
    budget = LookBudget(Limits())
    assert look(budget, 0.0, 9.0) == LOOK_SECONDS
    assert look(budget, 10.0, 9.0) == pytest.approx(4.8)
    assert look(budget, 20.0, 9.0) is None
    assert look(budget, 21.0, 0.9, least=4.0, from_reserve=True) == 0.9  # the same look, by another name
    assert look(budget, 30.0, 1.0) is None
    assert look(budget, 31.0, 1.0, from_reserve=True) == pytest.approx(0.3)
    assert look(budget, 32.0, 1.0, from_reserve=True) is None


def test_a_slow_vcpu_waits_until_a_look_is_long_enough() -> None:
    budget = LookBudget(Limits())
    assert (look(budget, 0.0, 5.0), look(budget, 10.0, 3.0)) == (5.0, 3.0)
    assert look(budget, 20.0, 5.0, least=4.0) is None
    assert look(budget, 74.0, 5.0) == pytest.approx(4.8)


def test_no_vcpu_is_too_slow_to_be_looked_at_again() -> None:
    budget = LookBudget(Limits())
    assert look(budget, 0.0, 5.0, least=100.0) == 5.0
    assert look(budget, 10.0, 5.0, least=100.0) == pytest.approx(4.8)


def test_a_vm_that_has_ended_is_forgotten() -> None:
    budget = LookBudget(Limits())
    budget.want(make_key(1))
    budget.want(make_key(2))
    budget.forget(make_key(1).vm)
    assert find_names(budget.start(0.0)) == [(2, 0)]
    budget.end(make_key(1), 0.0)


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 5.0), st.booleans()), max_size=60))
def test_no_minute_has_more_than_its_share(asked: list[tuple[float, float, bool]]) -> None:
    budget, now, looks = LookBudget(Limits()), 0.0, []
    for pause, seconds, from_reserve in asked:
        now += pause
        taken = look(budget, now, seconds, from_reserve=from_reserve)
        if taken is not None:
            looks.append((now, now + taken))
            now += taken
    for _, end in looks[1:]:
        used = sum(max(0.0, min(ended, end) - max(began, end - 60.0)) for began, ended in looks[1:])
        assert used <= 6.0 + 1e-6
