"""While only numbers move, readings are made of those before; all else makes them and their composition anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvm.model import EXITS, Owner, Protection, Vm, VmCounters, VmKey, VmReading
from kvm.readings import Answer, Answers, Readings
from tests.snapshots import INTEL

FIRST, SECOND = VmKey(11, 1, 9), VmKey(22, 1, 9)
ARMED = 1
PROC = Path("/nowhere")


class Source:
    """What a source that finds VMs by itself tells of two: the same objects for what has not changed."""

    def __init__(self) -> None:
        self.name = "bpf"
        self.host = INTEL
        # By id: not the order in which the source has them.
        vms = [Vm("a", SECOND, Owner("qemu"), None), Vm("b", FIRST, Owner("qemu"), None)]
        self.vms = {vm.key: vm for vm in vms}
        self.found = {
            key: VmCounters((0, 2), (None, None), {EXITS: (1, key.pid)}, notify_window_cycles=0, notify_flags=ARMED)
            for key in (FIRST, SECOND)
        }
        self.readings = Readings(PROC, PROC)

    def change(self, key: VmKey, **fields: object) -> None:
        """Have the source tell something else of a VM."""
        self.found[key] = self.found[key]._replace(**fields)  # type: ignore[arg-type]

    def make(self) -> tuple[list[VmReading], object]:
        """Make the readings of a snapshot; they are those that would be made by somebody who has kept nothing."""
        answers = Answers(self.name, dict(self.found))
        made = [*self.readings.make(answers, self.vms, self.host, 0.0)]
        assert made == [*Readings(PROC, PROC).make(answers, dict(self.vms), self.host, 0.0)]
        return made, self.readings.composition


def test_numbers_alone_leave_all_else_the_same_objects() -> None:
    source = Source()
    before, composition = source.make()
    source.change(FIRST, per_vcpu={EXITS: (5, 6)})
    after, same = source.make()
    assert same is composition
    assert [reading.vm.id for reading in after] == ["a", "b"]
    assert after[0] is before[0]
    assert after[1].counters.per_vcpu[EXITS] == (5, 6)
    assert (after[1].vm, after[1].vcpus) == (before[1].vm, before[1].vcpus)
    assert after[1].vcpus is before[1].vcpus
    assert before[1].counters.per_vcpu[EXITS] == (1, FIRST.pid)


def end_vm(source: Source) -> None:
    del source.vms[FIRST], source.found[FIRST]
    source.vms = dict(source.vms)


def plug_vcpu(source: Source) -> None:
    source.change(FIRST, vcpu_ids=(0, 2, 4), tids=(None, None, None), per_vcpu={EXITS: (1, 2, 3)})


def replace_vcpu(source: Source) -> None:
    source.change(FIRST, vcpu_ids=(0, 4))


def start_thread(source: Source) -> None:
    source.change(FIRST, tids=(11, None))


def disarm(source: Source) -> None:
    source.change(FIRST, notify_flags=0)


def set_window(source: Source) -> None:
    source.change(FIRST, notify_window_cycles=128)


def rename(source: Source) -> None:
    source.vms = {**source.vms, FIRST: replace(source.vms[FIRST], id="c")}


def find_another_host(source: Source) -> None:
    source.host = replace(INTEL, notify_supported=False)


def read_by_another(source: Source) -> None:
    source.name = "files"


def list_in_another_order(source: Source) -> None:
    source.found = dict(reversed(source.found.items()))


CHANGES = [
    end_vm,
    plug_vcpu,
    replace_vcpu,
    start_thread,
    disarm,
    set_window,
    rename,
    find_another_host,
    read_by_another,
]


@pytest.mark.parametrize("change", [*CHANGES, list_in_another_order])
def test_all_else_is_another_composition(change: Callable[[Source], None]) -> None:
    source = Source()
    _, composition = source.make()
    change(source)
    readings, other = source.make()
    assert other is not composition
    assert {reading.vm.key for reading in readings} == source.vms.keys()
    _, same = source.make()
    assert same is other


def test_a_host_that_is_read_again_and_is_the_same_changes_nothing() -> None:
    source = Source()
    _, composition = source.make()
    source.host = replace(INTEL)
    assert source.host is not INTEL
    assert source.make()[1] is composition


class UnreadOnce(tuple[int, ...]):
    """vCPUs that cannot be looked at once."""

    fails = True

    def __iter__(self) -> Iterator[int]:
        if self.fails:
            self.fails = False
            raise MemoryError
        return super().__iter__()


def test_vcpus_that_could_not_be_looked_at_are_looked_at_again() -> None:
    source = Source()
    source.change(FIRST, vcpu_ids=UnreadOnce((0, 2)))
    with pytest.raises(MemoryError):
        source.readings.make(Answers(source.name, dict(source.found)), source.vms, INTEL, 0.0)
    readings, _ = source.make()
    assert [len(reading.vcpus) for reading in readings] == [2, 2]


def test_where_nobody_finds_all_vms_by_himself_each_snapshot_is_made_anew() -> None:
    source = Source()
    each = {key: Answer("stats_fd", source.found[key], (0, 2), key.pid, knows_threads=True) for key in source.vms}
    first = source.readings.make(Answers(each=each), source.vms, INTEL, 0.0)
    composition = source.readings.composition
    assert source.readings.make(Answers(each=each), source.vms, INTEL, 0.0) == first
    assert source.readings.composition is not composition
    assert all(reading.protection is Protection.ARMED for reading in first)


def test_after_a_snapshot_by_others_the_composition_is_another() -> None:
    source = Source()
    _, composition = source.make()
    each = {key: Answer("stats_fd", source.found[key], (0, 2), key.pid, knows_threads=True) for key in source.vms}
    source.readings.make(Answers(each=each), source.vms, INTEL, 0.0)
    assert source.readings.composition is not composition
    _, other = source.make()
    assert other is not composition
