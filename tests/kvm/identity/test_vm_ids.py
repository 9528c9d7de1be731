"""Ids of VMs: unique, the same for life, and nobody's to take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.discovery.processes import read_stat
from kvm.identity.vm_ids import AGENT_COMM, VmIds, choose_ids, name_vm
from kvm.model import Identity, Owner, VmKey
from kvm.read_errors import ReadErrors

UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"
OLD, YOUNG = VmKey(100, 1, 9), VmKey(200, 2, 9)
UNVOUCHED = [Identity.CONTAINER, Identity.CMDLINE, Identity.CLAIMED]


keys = st.builds(VmKey, st.integers(1, 5), st.integers(1, 3), st.integers(-1, 3))
identities = st.sampled_from(["a", "a-1", "a-1-1", "a-1-1-0", "", "b"])


@given(st.dictionaries(keys, identities, max_size=30))
def test_ids_are_unique_whatever_vms_claim(claims: dict[VmKey, str]) -> None:
    owners = {key: Owner("qemu", uuid=uuid, identity=Identity.LIBVIRT) for key, uuid in claims.items()}
    ids = choose_ids(owners, {})
    assert len(set(ids.values())) == len(claims)
    assert choose_ids(owners, ids) == ids
    survivors = dict(list(owners.items())[::2])
    assert choose_ids(survivors, ids) == {key: ids[key] for key in survivors}


@given(st.sampled_from(list(Identity)), identities, keys)
def test_an_id_depends_on_nobody_else_unless_a_manager_gives_one_twice(
    identity: Identity, uuid: str, key: VmKey
) -> None:
    owner = Owner("qemu", uuid=uuid, identity=identity)
    assert choose_ids({key: owner}, {})[key] == name_vm(owner, key)
    assert (name_vm(owner, key) == uuid) is (bool(uuid) and identity.is_unique)


@pytest.mark.parametrize("identity", UNVOUCHED)
def test_a_younger_one_does_not_inherit_the_id_of_one_that_has_ended(identity: Identity) -> None:
    owner = Owner("qemu", uuid=UUID, identity=identity)
    together = choose_ids({OLD: owner, YOUNG: owner}, {})
    assert together == {OLD: f"{UUID}-100", YOUNG: f"{UUID}-200"}
    # The older one ends, and the agent is started anew.
    assert choose_ids({YOUNG: owner}, {}) == {YOUNG: together[YOUNG]}


@pytest.mark.parametrize("identity", UNVOUCHED)
@pytest.mark.parametrize(("victim", "squatter"), [(OLD, YOUNG), (YOUNG, OLD)])
def test_a_squatter_takes_no_id_whoever_came_first(identity: Identity, victim: VmKey, squatter: VmKey) -> None:
    owners = {
        victim: Owner("qemu", name="shop-db", uuid=UUID, identity=Identity.LIBVIRT, uid=64055),
        squatter: Owner("qemu", name="shop-db", uuid=UUID, identity=identity, uid=1000),
    }
    assert choose_ids(owners, {}) == {victim: UUID, squatter: f"{UUID}-{squatter.pid}"}


class Clock:
    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return 1.7e9 + self.offset


def make_ids(owners: dict[tuple[int, int], Owner], clock: Clock) -> VmIds:
    return VmIds(lambda _wanted, _wait: owners, ReadErrors(), Path("/proc"), clock)


def test_start_times_follow_a_step_of_the_clock() -> None:
    clock = Clock()
    ids = make_ids({OLD[:2]: Owner("qemu")}, clock)
    before = ids.identify({OLD: None})[OLD]
    assert ids.identify({OLD: None})[OLD] is before
    clock.offset = 3600.0
    after = ids.identify({OLD: None})[OLD]
    assert before.start_time_seconds is not None
    assert after.start_time_seconds is not None
    assert after.start_time_seconds - before.start_time_seconds == pytest.approx(3600.0, abs=5.0)
    assert (after.id, after.owner) == (before.id, before.owner)


def test_vms_that_come_and_go_are_told_apart_from_those_that_stay() -> None:
    owners = {OLD[:2]: Owner("qemu"), YOUNG[:2]: Owner("qemu")}
    wanted: list[set[tuple[int, int]]] = []

    def find_owners(tids: Mapping[tuple[int, int], int], _wait: float) -> Mapping[tuple[int, int], Owner]:
        wanted.append(set(tids))
        return {process: owners[process] for process in tids}

    ids = VmIds(find_owners, ReadErrors(), Path("/proc"), Clock())
    for keys in ([OLD], [OLD], [OLD, YOUNG], [OLD, YOUNG], [YOUNG], [YOUNG], []):
        found = ids.identify(dict.fromkeys(keys, 1))
        assert list(found) == keys
        assert wanted[-1] == {key[:2] for key in keys}, "hung look-ups are given up on whether VMs come or not"
    assert len(wanted) == 7


def test_vms_are_told_in_the_order_of_their_ids_whoever_came_first() -> None:
    owners = {OLD[:2]: Owner("qemu", name="b"), YOUNG[:2]: Owner("firecracker", name="a")}
    ids = make_ids(owners, Clock())
    for keys in ([OLD], [OLD, YOUNG], [YOUNG, OLD]):
        found = [vm.id for vm in ids.identify(dict.fromkeys(keys, 1)).values()]
        assert found == sorted(found)
        assert len(found) == len(keys)


@pytest.mark.parametrize(("uid", "is_hidden"), [(0, True), (os.getuid(), True), (64055, False), (None, False)])
def test_an_agents_own_vm_is_none_of_the_hosts_and_nobody_else_hides_by_its_name(
    uid: int | None, is_hidden: bool
) -> None:
    ids = make_ids({OLD[:2]: Owner(AGENT_COMM, uid=uid)}, Clock())
    assert (OLD not in ids.identify({OLD: None})) is is_hidden


def test_a_process_that_goes_on_making_vms_of_one_identity_is_one_conflict() -> None:
    errors, process = ReadErrors(), (os.getpid(), read_stat(Path("/proc"), os.getpid()).start_ticks)
    other = (process[0], process[1] + 1)
    owner = Owner("qemu", uuid=UUID)
    ids = VmIds(lambda wanted, _wait: dict.fromkeys(wanted, owner), errors, Path("/proc"), Clock())
    for number in range(300):
        keys = [VmKey(*process, 3), VmKey(*process, 10 + number), VmKey(*process, 20 + number)]
        ids.identify(dict.fromkeys(keys, process[0]))
        ids.identify({})
        errors.log_new([])
    assert errors.counts == {("owners", "duplicate"): 1}
    ids.identify({VmKey(*other, number): other[0] for number in range(3)})
    assert errors.counts == {("owners", "duplicate"): 2}
