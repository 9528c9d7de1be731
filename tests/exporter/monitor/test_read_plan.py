"""Which vCPUs are read when, one by one."""

from __future__ import annotations

from exporter.monitor.read_plan import READS_PER_SECOND, choose_due, find_next
from exporter.monitor.tracked_vcpu import TrackedVcpu
from exporter.stalls.detector import StallDetector
from exporter.stalls.verdicts import StallRule
from kvm.model import VcpuKey
from tests.fake_host import FakeVm


def make(number: int, count: int = 1, undecided: bool = False) -> list[TrackedVcpu]:
    vm = FakeVm(f"vm{number}", 1000 + number, count)
    reading = vm.read()
    made = []
    for vcpu in reading.vcpus:
        detector = StallDetector(StallRule(), 100.0)
        if undecided:
            detector.observe_trigger(100.0)
        made.append(TrackedVcpu(VcpuKey(vm.key, vcpu.vcpu_id), vm.vm, vcpu, "bpf", detector, read_at=100.0))
    return made


def test_nothing_is_due_where_there_is_none() -> None:
    assert find_next([], 100.0) == float("inf")
    assert choose_due([], 100.0) == []


def test_a_vcpu_is_read_at_once_and_then_each_second() -> None:
    (vcpu,) = make(1)
    vcpu.read_at = float("-inf")
    assert choose_due([vcpu], 100.0) == [vcpu]
    vcpu.read_at = 100.0
    assert find_next([vcpu], 100.0) == 101.0
    assert choose_due([vcpu], 100.9) == []
    assert choose_due([vcpu], 101.0) == [vcpu]


def test_news_is_read_often_for_three_seconds() -> None:
    (vcpu,) = make(1, undecided=True)
    assert find_next([vcpu], 100.0) == 100.1
    vcpu.read_at = 103.5
    assert find_next([vcpu], 103.5) == 104.5


def test_many_share_what_may_be_read_and_who_waited_longest_is_first() -> None:
    vcpus = make(1, 2 * READS_PER_SECOND)
    assert find_next(vcpus, 100.0) == 102.0
    for number, vcpu in enumerate(vcpus):
        vcpu.read_at = 90.0 - number / 1000
    due = choose_due(vcpus, 100.0)
    assert due == vcpus[::-1][:READS_PER_SECOND]


def test_many_undecided_vcpus_do_not_delay_the_others() -> None:
    undecided, other = make(1, 4 * READS_PER_SECOND, undecided=True), make(2)
    assert find_next(undecided, 100.0) == 104.0
    assert find_next([*undecided[:32], *other], 100.0) == 100.1
    assert other[0] in choose_due([*undecided[:32], *other], 101.0)
