"""The ways to read KVM's counters, one file each, behind one Protocol.

A source is opened once, asked at every snapshot for the VMs that no better source has read, and closed at the end. What
it cannot do at all it says by raising ``SourceUnavailable``; what it cannot do for one VM it says in that VM's
``VmCounters.problem``, and the other VMs are read all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvm.discovery.vm_discovery import HeldVm
from kvm.model import VmCounters, VmKey


class CounterSource(Protocol):
    """One way to read counters.

    ``name`` is the value of the label ``source``. ``finds_vms`` is true where the source sees every VM of the host by
    itself: then ``read`` may answer for more VMs than it was asked for, and nobody has to look for them.
    """

    name: str
    finds_vms: bool

    @property
    def limits(self) -> str:
        """What the source lacks although it works, and why; "" where nothing."""
        ...

    @property
    def doubt(self) -> str:
        """Why it is not known whether an open source can read anything; "" once it has read something."""
        ...

    def open(self) -> None:
        """Make the source ready; raises SourceUnavailable with the reason and a remedy."""
        ...

    def read(self, vms: Sequence[HeldVm], *, again: bool = False) -> Mapping[VmKey, VmCounters]:
        """Read the counters of these VMs; a VM that has ended has no entry.

        With ``again`` they are VMs that had no entry a moment ago, described anew: what was read of the others stands.
        Raises SourceUnavailable if the source has stopped working as a whole.
        """
        ...

    def close(self) -> None:
        """Give back what ``open`` took; may be called twice."""
        ...
