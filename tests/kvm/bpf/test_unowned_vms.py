"""How often the files of the host are searched for VMs whose process has ended, and what is known in between."""

from __future__ import annotations

from kvm.bpf.unowned_vms import REST_FACTOR, UnownedVms
from kvm.bpf.vcpu_decode import HostBlocks, find_all
from tests.kvm.bpf.test_vcpu_decode import pack_vm

EMPTY = HostBlocks(b"", b"", ((), ()))
SEARCH_SECONDS = 0.09  # 1.2 million files


class Host:
    """A host that is read each second; to search its files takes a while. ``held`` are VMs of which a child has fds."""

    def __init__(self) -> None:
        self.unowned = UnownedVms()
        self.now = 0.0
        self.listed: set[int] = set()
        self.held: set[int] = set()
        self.searches = 0

    def read(self) -> set[int]:
        """The VMs of one snapshot."""
        self.now += 1.0
        listed = EMPTY._replace(vms=b"".join(pack_vm(kvm, 0, 0, tgid=0) for kvm in sorted(self.listed)))
        began = self.now
        if asked := self.unowned.choose(listed.vms, began):
            self.searches += 1
            self.now += SEARCH_SECONDS
            found = EMPTY._replace(vms=b"".join(pack_vm(kvm, 0, 0, tgid=77) for kvm in sorted(self.held)))
            self.unowned.take(asked, found, began, self.now)
        joined = self.unowned.join(listed)
        return find_all(joined.vms[len(listed.vms) :])


def test_a_vm_that_a_child_holds_is_searched_in_a_hundredth_of_the_time_and_seen_all_the_time() -> None:
    host = Host()
    host.listed = host.held = {0xA}
    seen = [host.read() for _ in range(1000)]
    assert seen[:1] == [set()]  # most VMs without a process are just ending
    assert all(vms == {0xA} for vms in seen[1:])
    assert 2 <= host.searches <= 1 + host.now / (REST_FACTOR * SEARCH_SECONDS)


def test_whoever_leaves_a_new_vm_behind_each_second_has_no_more_searched() -> None:
    host = Host()
    for kvm in range(1, 1001):
        host.listed.add(kvm)
        host.held.add(kvm)
        host.read()
    assert host.searches <= 1 + host.now / (REST_FACTOR * SEARCH_SECONDS)
    for _ in range(10):
        seen = host.read()
    assert seen == host.held


def test_what_nobody_holds_is_searched_once_and_what_has_gone_is_not_kept() -> None:
    host = Host()
    host.listed = {0xA}
    assert [host.read() for _ in range(100)] == [set()] * 100
    assert host.searches == 1
    host.listed = host.held = {0xB}
    for _ in range(20):
        host.read()
    assert host.read() == {0xB}
    host.listed = set()
    assert host.read() == set()
