"""Counts what could not be read, and logs each trouble once and not on every snapshot.

A trouble is told by VM, or by process where no more is known when it is found. What a VM is called is known at the end
of a snapshot: then its trouble is logged with its name, and so is a process's if it has a single VM. Of each kind the
first trouble of a process is logged: one with VMs by the dozen must not use up what may be said of others. Whoever
makes processes by the thousand makes as many troubles: of one kind so many are logged in a minute, and of the rest
their number.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kvm.log_limit import LogLimit
from kvm.model import Vm, VmKey

log = logging.getLogger(__name__)

# Troubles of processes that hold no VM are remembered too, but not for ever.
MAX_LOGGED = 10_000
# Of one kind, in a minute.
LINES = 10

MESSAGES = {
    "duplicate": "two VMs claim one identity",
    "fds": "out of file descriptors",
    "hung": "a process does not let its command line be read",
    "pending": "VM left out until its owner is known",
    "unread": "no source can read the VM",
}


Subject = VmKey | int
"""Who has a trouble: a VM, or a process by its pid."""


class ReadErrors:
    """The tally of what could not be read, by (source, kind), since start.

    A trouble is logged when a process first has it; then only counted, until the process has ended. ``clock`` gives
    seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = LogLimit(LINES, clock)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._logged: dict[tuple[int, str, str], None] = {}
        self._vm_pids: set[int] = set()
        self._new: dict[tuple[int, str, str], tuple[Subject, str]] = {}

    def teller(self, source: str) -> Callable[[Subject, str, str], None]:
        """Return a function that records a trouble of this source: (whose, kind, message)."""

        def tell(whose: Subject, kind: str, message: str) -> None:
            self.record(source, whose, kind, message)

        return tell

    def record(self, source: str, whose: Subject, kind: str, message: str) -> None:
        """Count one trouble of a VM or of a process; of no single one if that is 0."""
        self._counts[source, kind] += 1
        trouble = whose if isinstance(whose, int) else whose.pid, source, kind
        if trouble not in self._logged:
            self._new.setdefault(trouble, (whose, message))

    def log_new(self, found: Iterable[Vm]) -> None:
        """Log the troubles that are new since the snapshot before, and forget those of VMs that have ended.

        ``found`` are the VMs of this snapshot; where there never was any trouble, nobody asks for them.
        """
        if not (self._new or self._logged):
            self._vm_pids = set()
            return
        vms: dict[Subject, list[Vm]] = {}
        for vm in found:
            vms.setdefault(vm.key.pid, []).append(vm)
            vms[vm.key] = [vm]
        for (pid, source, kind), (whose, why) in self._new.items():
            admitted = self._limit.admit(kind)
            if admitted is None:
                continue
            fields: dict[str, object] = {"source": source, "kind": kind, "reason": why}
            if pid:
                fields["pid"] = pid
            if len(named := vms.get(whose, [])) == 1:
                fields |= {"vm": named[0].id, "name": named[0].owner.name}
            log.warning(MESSAGES.get(kind, "something could not be read"), extra={"fields": {**fields, **admitted}})
        ended = self._vm_pids - vms.keys()
        logged = [entry for entry in (*self._logged, *self._new) if entry[0] not in ended]
        self._logged = dict.fromkeys(logged[-MAX_LOGGED:])
        self._vm_pids, self._new = {whose for whose in vms if isinstance(whose, int)}, {}

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many troubles there were, by (source, kind)."""
        return MappingProxyType(dict(self._counts))
