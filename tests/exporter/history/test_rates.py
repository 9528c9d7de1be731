"""What counters did of late: rates, steps and gaps, with a clock of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.history.rate_estimate import GAP_SECONDS
from exporter.history.rates import MAX_GONE, MAX_NUMBERS, NOW_SECONDS, WHOLE_VM, WINDOW_SECONDS, RateHistory
from exporter.history.steps import SPACING_SECONDS, Step
from kvm.model import NOTIFY_WINDOW_EXITS, Snapshot, VmCounters, VmKey, VmReading
from tests.snapshots import make_reading, make_snapshot

KEY = make_reading().vm.key


Look = Callable[..., Snapshot]


def look_anew(seconds: float, *readings: VmReading) -> Snapshot:
    """A snapshot that does not tell whether anything but numbers has moved."""
    return replace(make_snapshot(*readings), monotonic_seconds=seconds)


def open_look(*, tells: bool) -> Look:
    """Return what makes snapshots, such that tell that nothing but numbers has moved or such that do not."""
    compositions: dict[object, object] = {}

    def look_and_tell(seconds: float, *readings: VmReading) -> Snapshot:
        told = tuple((reading.vm, reading.counters.vcpu_ids) for reading in readings)
        return replace(look_anew(seconds, *readings), composition=compositions.setdefault(told, object()))

    return look_and_tell if tells else look_anew


@pytest.fixture(params=[True, False])
def look(request: pytest.FixtureRequest) -> Look:
    return open_look(tells=request.param)


def follow(look: Look, numbers: Iterable[tuple[float, int]]) -> RateHistory:
    """A history of one vCPU that has had these numbers at these times."""
    history = RateHistory()
    for seconds, number in numbers:
        history.observe(look(seconds, make_reading(notify=(number,))))
    return history


def count_numbers(history: RateHistory) -> int:
    history.find_rates(KEY, 0.0)  # so that all is taken in
    columns = {id(s.column): len(s.column) for samples in history._vms.values() for s in samples.kept}
    return sum(columns.values())


def test_a_rate_is_of_the_last_seconds(look: Look) -> None:
    history = follow(look, ((float(second), 40 * second) for second in range(60)))
    assert history.find_rates(KEY, 59.5) == {0: pytest.approx(40)}


def test_one_exit_in_20_seconds_is_three_a_minute_all_the_time(look: Look) -> None:
    history, rates = RateHistory(), []
    for second in range(400):
        history.observe(look(float(second), make_reading(notify=(7 + second // 20, 7))))
        if second >= 45:
            rates.append(history.find_rates(KEY, float(second)))
    assert {rate[2] for rate in rates} == {0.0}
    assert all(rate[0] == pytest.approx(3 / 60, rel=0.04) for rate in rates)


def test_one_exit_in_20_seconds_is_a_bar_each_and_no_peak_of_one_a_second(look: Look) -> None:
    history = follow(look, ((float(second), second // 20) for second in range(400)))
    for now in range(400, 420):
        history.observe(look(float(now), make_reading(notify=(now // 20,))))
        steps = history.find_steps(KEY, 0, float(now))
        bars = [step for step in steps if step.rate]
        assert len(bars) in (15, 16)
        assert all(round(bar.exits, 6) == 1 for bar in bars[1:])
        assert all(bar.seconds >= SPACING_SECONDS for bar in bars[1:])


def test_a_stall_shows_up_in_the_rate_at_once(look: Look) -> None:
    history = follow(look, [*((float(second), 7) for second in range(100)), (100.0, 47)])
    assert history.find_rates(KEY, 100.0) == {0: pytest.approx(40 / 5)}


def test_after_a_long_silence_of_ours_a_counter_that_stands_still_has_a_rate_and_one_that_does_not_has_none(
    look: Look,
) -> None:
    assert follow(look, [(0, 7), (1000, 7)]).find_rates(KEY, 1000) == {0: 0.0}
    assert follow(look, [(0, 7), (1000, 8)]).find_rates(KEY, 1000) == {0: None}
    assert follow(look, [(0, 7), (1000, 8), (1001, 8)]).find_rates(KEY, 1001) == {0: pytest.approx(0)}


def test_what_is_not_known_is_absent_and_not_0(look: Look) -> None:
    assert RateHistory().find_rates(KEY, 0.0) == {}
    assert follow(look, [(0, 7)]).find_rates(KEY, 0.0) == {}
    assert follow(look, [(0, 7), (1, 7)]).find_rates(KEY, 1 + NOW_SECONDS + 0.1) == {}
    assert follow(look, [(0, 7), (1, 3)]).find_rates(KEY, 1) == {0: None}  # it was reset
    assert follow(look, [(0, 7), (1, 7)]).find_steps(KEY, 4, 1) == []


def test_a_gap_is_a_gap(look: Look) -> None:
    history = follow(look, [(0, 0), (60, 60), (60 + GAP_SECONDS + 1, 500), (140, 504), (150, 3), (160, 13)])
    assert history.find_steps(KEY, 0, 160) == [
        Step(0, 60, 1.0),
        Step(60 + GAP_SECONDS + 1, 140, 1.0),
        Step(150, 160, 1.0),
    ]


def test_a_time_without_looks_and_without_movement_is_none(look: Look) -> None:
    assert follow(look, [(0, 5), (250, 5)]).find_steps(KEY, 0, 250) == [Step(0, 250, 0.0)]


def test_the_window_moves_on(look: Look) -> None:
    history = follow(look, ((float(second), second) for second in range(1000)))
    steps = history.find_steps(KEY, 0, 999)
    assert steps[0].began == pytest.approx(999 - WINDOW_SECONDS, abs=0.01)
    assert steps[-1].ended == 999
    assert all(step.rate == pytest.approx(1) for step in steps)
    assert len(steps) <= WINDOW_SECONDS / 4 + 2


def test_a_quiet_vm_costs_two_samples(look: Look) -> None:
    history = RateHistory()
    for second in range(100):
        history.observe(look(float(second), make_reading(notify=(3,) * 16)))
    assert count_numbers(history) == 16


def test_a_vcpu_that_is_plugged_in_begins_then(look: Look) -> None:
    history = RateHistory()
    history.observe(look(0, make_reading(notify=(1,))))
    history.observe(look(6, make_reading(notify=(1, 5))))
    history.observe(look(12, make_reading(notify=(1, 11))))
    assert history.find_rates(KEY, 12) == {0: 0.0, 2: pytest.approx(1.0)}
    assert history.find_steps(KEY, 2, 12) == [Step(6, 12, 1.0)]


def test_a_vm_that_is_known_by_its_sum_only(look: Look) -> None:
    history = RateHistory()
    for second, total in ((0, 5), (10, 25)):
        reading = replace(make_reading(), vcpus=(), counters=VmCounters(totals={NOTIFY_WINDOW_EXITS: total}))
        history.observe(look(second, reading))
    assert history.find_rates(KEY, 10) == {WHOLE_VM: pytest.approx(2)}


def test_a_column_that_does_not_fit_its_ids_is_left_out(look: Look) -> None:
    history, reading = RateHistory(), make_reading(notify=(1, 2))
    for second in (0, 6):
        torn = reading.counters._replace(per_vcpu={NOTIFY_WINDOW_EXITS: (1, 2, 3 + second)})
        history.observe(look(second, replace(reading, counters=torn)))
    assert history.find_rates(KEY, 6) == {}
    assert history.find_steps(KEY, 0, 6) == []


def test_a_vm_that_is_gone_is_forgotten(look: Look) -> None:
    history = follow(look, [(0, 1), (1, 2)])
    history.observe(look(WINDOW_SECONDS + 2))
    assert history.find_steps(KEY, 0, 2) == []
    assert count_numbers(history) == 0


def test_a_look_that_comes_late_changes_nothing(look: Look) -> None:
    history = follow(look, [(0, 1), (10, 2), (5, 1)])
    assert history.find_steps(KEY, 0, 10) == [Step(0, 10, 0.1)]


def test_a_host_that_floods_is_kept_in_bounds(look: Look) -> None:
    history = RateHistory()
    for second in range(0, 600, 2):
        readings = [make_reading(notify=(second,) * 500, pid=pid) for pid in range(20)]
        history.observe(look(float(second), *readings))
    assert count_numbers(history) <= 1.3 * MAX_NUMBERS
    assert len(history.find_steps(readings[0].vm.key, 0, 598)) >= 10


@pytest.mark.parametrize("tells", [True, False])
@given(
    moves=st.lists(
        st.tuples(st.floats(min_value=0.01, max_value=200), st.integers(min_value=0, max_value=50)),
        min_size=1,
        max_size=80,
    )
)
def test_steps_never_claim_more_exits_than_there_were(tells: bool, moves: list[tuple[float, int]]) -> None:
    seconds, number, numbers = 0.0, 0, [(0.0, 0)]
    for pause, increase in moves:
        seconds, number = seconds + pause, number + increase
        numbers.append((seconds, number))
    history = follow(open_look(tells=tells), numbers)
    steps = history.find_steps(KEY, 0, seconds)
    for step, after in pairwise(steps):
        assert step.ended <= after.began
    claimed = sum(step.rate * (step.ended - step.began) for step in steps)
    assert claimed <= number + 0.001
    rate = history.find_rates(KEY, seconds).get(0)
    assert rate is None or rate >= 0


def test_vms_that_are_made_by_the_thousand_are_forgotten_sooner(look: Look) -> None:
    history, kept = RateHistory(), make_reading()
    for second in range(40):
        made = [make_reading(pid=1000 + 500 * second + number) for number in range(500)]
        history.observe(look(float(second), kept, *made))
        assert len(history._vms) <= MAX_GONE + 501
    assert history.find_rates(KEY, 39.0)


def test_a_vm_in_anothers_place_is_not_taken_for_it(look: Look) -> None:
    history = RateHistory()
    for second, pid in enumerate((1, 1, 2, 2)):
        history.observe(look(float(second), make_reading(notify=(7,), pid=pid)))
    assert [history.find_rates(VmKey(pid, 77, 9), 3.0) for pid in (1, 2)] == [{0: 0.0}, {0: 0.0}]


def test_an_older_snapshot_changes_nothing(look: Look) -> None:
    history = follow(look, [(0.0, 7), (10.0, 8), (20.0, 8)])
    steps = history.find_steps(KEY, 0, 20.0)
    history.observe(look(15.0, make_reading(notify=(9,))))
    history.observe(look(20.0, make_reading(notify=(9,))))
    assert history.find_steps(KEY, 0, 20.0) == steps


def test_when_a_counter_moved_is_known_as_exactly_where_somebody_has_asked_just_then() -> None:
    history, look = RateHistory(), open_look(tells=True)
    for seconds, number in ((105.8, 2), (106.1, 9), (106.4, 9), (111.4, 9)):
        history.observe(look(seconds, make_reading(notify=(number,))))
        if seconds == 106.1:
            assert [step.exits for step in history.find_steps(KEY, 0, seconds)] == [pytest.approx(7)]
    assert count_numbers(history) == 2
    assert [sample.seconds for sample in history._vms[KEY].kept] == [105.8, 106.1, 111.4]
