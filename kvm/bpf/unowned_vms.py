"""VMs whose own process has ended while another holds their files; no I/O.

Most VMs without a process are just ending. So the files of the host, which take long to read, are asked only
about those that have been so for a while, and no more about those that nobody holds.
"""

from __future__ import annotations

from collections.abc import Collection

from kvm.bpf.vcpu_decode import HostBlocks, find_all, find_unowned, keep_vms

# A process that ends has no memory any more some time before its VMs are gone.
ENDING_SECONDS = 1.0


class UnownedVms:
    """The VMs without a process, by the address of their struct kvm: since when, and which of them nobody holds."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._unheld: set[int] = set()

    def choose(self, vms: bytes, now: float) -> Collection[int]:
        """Take in a read by KVM's list, and choose the VMs that the files of the host are to be read for."""
        self._since = {kvm: self._since.get(kvm, now) for kvm in find_unowned(vms)}
        self._unheld &= self._since.keys()
        return {kvm for kvm, since in self._since.items() if now - since >= ENDING_SECONDS} - self._unheld

    def take(self, asked: Collection[int], files: HostBlocks) -> HostBlocks:
        """Take in a read by files, and return what it says of the VMs that were asked about."""
        held = keep_vms(files, asked)
        self._unheld |= set(asked) - find_all(held.vms)
        return held
