"""Which capabilities are kept of those that are held. That they are, tests/live/test_least_privilege.py shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm import abi
from kvm.host.capabilities import choose_capabilities, name_capabilities
from kvm.host.privileges import NEEDED_CAPABILITIES, Privileges

ALL = 2**41 - 1


@pytest.mark.parametrize(
    ("needed", "held", "kept"),
    [
        (("CAP_BPF", "CAP_PERFMON"), ALL, ("CAP_PERFMON", "CAP_BPF")),
        (("CAP_BPF",), 1 << abi.CAP_SYS_ADMIN | 1 << abi.CAP_SYS_PTRACE, ("CAP_SYS_ADMIN",)),
        (("CAP_DAC_READ_SEARCH",), 1 << abi.CAP_DAC_OVERRIDE, ("CAP_DAC_OVERRIDE",)),
        (("CAP_SYS_PTRACE",), 1 << abi.CAP_SYS_ADMIN, ()),
        ((), ALL, ()),
        (("CAP_BPF",), 0, ()),
    ],
)
def test_what_is_needed_is_kept_or_what_implies_it(needed: tuple[str, ...], held: int, kept: tuple[str, ...]) -> None:
    assert name_capabilities(choose_capabilities(needed, held)) == kept


@given(st.sets(st.sampled_from(sorted(NEEDED_CAPABILITIES))), st.integers(0, ALL))
def test_nothing_is_gained_and_nothing_that_is_needed_is_lost(needed: set[str], held: int) -> None:
    kept = choose_capabilities(needed, held)
    assert kept & ~held == 0
    before, after = Privileges(uid=1, capabilities=held), Privileges(uid=1, capabilities=kept)
    assert [name for name in needed if before.lacks(name)] == [name for name in needed if after.lacks(name)]
