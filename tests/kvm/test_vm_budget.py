"""Who has too many VMs loses those beyond the budget, and nobody else loses any."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.model import VmKey
from kvm.vm_budget import MAX_LOGGED, QUIET_SECONDS, VmBudget


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_budget(clock: Clock | None = None, process_vms: int = 3, uid_vms: int = 10) -> VmBudget:
    """A budget for which the uid of a process is its pid's thousands."""
    return VmBudget(
        Path("/proc"),
        clock or Clock(),
        process_vms=process_vms,
        uid_vms=uid_vms,
        read_uid=lambda _proc, pid: pid // 1000,
    )


def make_keys(pid: int, fds: Iterable[int], start: int = 5) -> dict[VmKey, str]:
    return {VmKey(pid, start, fd): f"{pid}-{fd}" for fd in fds}


def test_within_the_budget_everything_is_kept_as_it_is() -> None:
    budget, vms = make_budget(), {**make_keys(1001, range(3)), **make_keys(1002, range(3))}
    assert budget.keep(vms) == vms
    assert budget.over == 0


def test_a_process_keeps_its_first_vms_and_others_all_of_theirs() -> None:
    budget, honest = make_budget(), make_keys(2001, range(3))
    kept = budget.keep({**make_keys(1001, range(100)), **honest})
    assert kept == {**make_keys(1001, range(3)), **honest}
    assert budget.over == 97


def test_a_user_keeps_its_oldest_vms_and_others_all_of_theirs() -> None:
    budget = make_budget()
    flood = {key: vm for pid in range(1000, 1050) for key, vm in make_keys(pid, range(2), start=pid).items()}
    honest = {key: vm for pid in range(2000, 2005) for key, vm in make_keys(pid, range(2), start=9999).items()}
    kept = budget.keep({**flood, **honest})
    assert {key.pid for key in kept if key.pid < 2000} == set(range(1000, 1005))
    assert honest.items() <= kept.items()
    assert budget.over == 90


def test_what_is_shown_stays_shown_whatever_comes() -> None:
    budget = make_budget()
    first = make_keys(1001, (7, 8, 9))
    assert budget.keep(first) == first
    assert budget.keep({**make_keys(1001, range(9)), **first}) == first
    # One of them ends: the next takes its place.
    del first[VmKey(1001, 5, 8)]
    assert budget.keep({**make_keys(1001, range(7)), **first}).keys() == {*first, VmKey(1001, 5, 0)}


def test_when_there_are_fewer_all_are_shown_again() -> None:
    budget = make_budget()
    budget.keep(make_keys(1001, range(9)))
    assert budget.keep(make_keys(1001, (1, 8))) == make_keys(1001, (1, 8))
    assert budget.over == 0


@given(st.lists(st.tuples(st.integers(1000, 4000), st.integers(0, 12)), max_size=80), st.randoms())
def test_the_budget_holds_for_everybody_and_takes_from_nobody_within_it(
    held: list[tuple[int, int]], order: random.Random
) -> None:
    vms = {VmKey(pid, 5, fd): "" for pid, fd in held}
    keys = list(vms)
    order.shuffle(keys)
    kept = make_budget().keep(dict.fromkeys(keys, ""))
    processes = {pid: [key for key in vms if key.pid == pid] for pid, _fd in held}
    for uid in {pid // 1000 for pid in processes}:
        counts = {pid: min(3, len(keys)) for pid, keys in processes.items() if pid // 1000 == uid}
        shown = [key for key in kept if key.pid // 1000 == uid]
        assert len(shown) == min(10, sum(counts.values()))
        assert all(sum(key.pid == pid for key in shown) <= count for pid, count in counts.items())


def test_it_is_logged_once_whatever_comes_and_goes(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    budget = make_budget(clock)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            clock.now += 15.0
            budget.keep(make_keys(1000 + number % 7, range(4 + number % 2)))
            budget.keep(make_keys(1001, range(2)))
        assert [record.__dict__["fields"]["uid"] for record in caplog.records] == [1]
        clock.now += QUIET_SECONDS
        budget.keep(make_keys(1001, range(4)))
    assert len(caplog.records) == 2


def test_a_condition_that_stands_is_not_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    budget, vms = make_budget(clock), make_keys(1001, range(4))
    for _ in range(1000):
        clock.now += 15.0
        budget.keep(vms)
    budget.keep({**vms, **make_keys(1002, range(4))})
    assert len(caplog.records) == 1


def test_what_was_logged_is_not_remembered_for_ever() -> None:
    budget = make_budget()
    for uid in range(2 * MAX_LOGGED):
        budget.keep(make_keys(1000 * uid + 1, range(4)))
    assert len(budget._over_at) <= MAX_LOGGED


def test_a_user_who_is_over_again_after_hours_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    """What another user does meanwhile keeps nobody's silence."""
    clock = Clock()
    budget = make_budget(clock)
    crowds = [make_keys(1001, range(5)), make_keys(2001, range(5))]
    for crowd, snapshots in ((crowds[0], 3), (crowds[1], 200), (crowds[0], 3)):
        for _ in range(snapshots):
            clock.now += 60.0
            budget.keep(crowd)
    assert [vars(record)["fields"]["uid"] for record in caplog.records] == [1, 2, 1]


def test_each_process_is_asked_for_its_user_once() -> None:
    asked: list[int] = []

    def read_uid(_proc: Path, pid: int) -> int:
        asked.append(pid)
        return 1

    budget = VmBudget(Path("/proc"), Clock(), process_vms=3, uid_vms=10, read_uid=read_uid)
    crowd = {key: vm for pid in range(1000, 1010) for key, vm in make_keys(pid, range(5)).items()}
    for _ in range(3):
        budget.keep(crowd)
    assert sorted(asked) == list(range(1000, 1010))
    assert budget.over == 40
