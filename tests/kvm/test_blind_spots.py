"""Why VMs may be missing: every kind of evidence, and that nothing less than all of it is called complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.blind_spots import REFUSED_PROCESSES, BlindSpotLog, Evidence, find_blind_spots

ALL_SEEN = Evidence(initial_pid_namespace=True, works=True, finds_vms=True)
WITHOUT_BPF = replace(ALL_SEEN, finds_vms=False)


@pytest.mark.parametrize(
    ("seen", "reasons"),
    [
        (ALL_SEEN, []),
        (WITHOUT_BPF, []),
        (replace(ALL_SEEN, initial_pid_namespace=False), ["pid_namespace"]),
        (replace(ALL_SEEN, initial_pid_namespace=None), ["pid_namespace"]),
        (replace(ALL_SEEN, works=False), ["no_source"]),
        (replace(ALL_SEEN, hidden=26), ["hidden_processes"]),
        (replace(ALL_SEEN, pending=1), ["owners_pending"]),
        (replace(ALL_SEEN, over_budget=1), ["over_budget"]),
        # What /proc hides is no loss where a source finds every VM by itself.
        (replace(ALL_SEEN, sees_first_process=False), []),
        (replace(WITHOUT_BPF, sees_first_process=False), ["hidden_processes"]),
        (replace(WITHOUT_BPF, refused=REFUSED_PROCESSES), []),
        (replace(WITHOUT_BPF, refused=REFUSED_PROCESSES + 1), ["refused_processes"]),
        (replace(WITHOUT_BPF, refused=1, refused_may_hold_vms=True), ["refused_processes"]),
    ],
)
def test_each_blind_spot_has_its_name(seen: Evidence, reasons: list[str]) -> None:
    assert [spot.reason for spot in find_blind_spots(seen)] == reasons


@given(
    st.builds(
        Evidence,
        initial_pid_namespace=st.sampled_from([True, False, None]),
        works=st.booleans(),
        finds_vms=st.booleans(),
        pending=st.integers(0, 3),
        over_budget=st.integers(0, 2),
        hidden=st.integers(0, 3),
        sees_first_process=st.booleans(),
        refused=st.integers(0, 40),
        refused_may_hold_vms=st.booleans(),
    )
)
def test_only_what_has_seen_everything_is_complete(seen: Evidence) -> None:
    sees_processes = seen.sees_first_process and seen.refused <= REFUSED_PROCESSES and not seen.refused_may_hold_vms
    left_out = seen.pending or seen.hidden or seen.over_budget
    sees_all = seen.initial_pid_namespace is True and seen.works and not left_out
    assert (find_blind_spots(seen) == ()) is (sees_all and (seen.finds_vms or sees_processes))
    assert all(spot.text for spot in find_blind_spots(seen))


def test_the_log_tells_of_each_reason_once_and_of_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    spot_log = BlindSpotLog()
    hidden, none = replace(ALL_SEEN, hidden=1), replace(ALL_SEEN, hidden=2, works=False)
    story = (replace(ALL_SEEN, pending=3), hidden, hidden, none, none, hidden, *[ALL_SEEN] * 6)
    for number, seen in enumerate(story):
        spot_log.log_new(find_blind_spots(seen), 15.0 * number)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [
        ("WARNING", "VMs of this host may not be seen"),
        ("WARNING", "VMs of this host may not be seen"),
        ("INFO", "every VM of this host is seen"),
    ]


def test_a_reason_that_comes_and_goes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever makes and ends a VM too many, again and again, does not fill the log."""
    caplog.set_level("INFO")
    spot_log = BlindSpotLog()
    for number in range(1000):
        spot_log.log_new(find_blind_spots(replace(ALL_SEEN, over_budget=number % 2)), 15.0 * number)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_every_vm_is_not_said_to_be_seen_while_an_owner_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    spot_log = BlindSpotLog()
    spot_log.log_new(find_blind_spots(replace(ALL_SEEN, over_budget=1)), 0.0)
    for number in range(100):
        spot_log.log_new(find_blind_spots(replace(ALL_SEEN, pending=1)), 15.0 * number)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
