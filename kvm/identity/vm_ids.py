"""Says which VM is which: an owner and an id for each, found out once and kept for the VM's life."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvm import abi
from kvm.discovery.processes import find_living_thread, read_stat
from kvm.errors import MalformedData
from kvm.model import Owner, Vm, VmKey
from kvm.read_errors import ReadErrors

# New VMs' owners are waited for this long: reading a command line takes microseconds, unless its process hangs.
OWNER_WAIT_SECONDS = 1.0

# Whose VMs are these processes, given a living thread of each (pid, start_ticks)? Waits so many seconds at most, and
# leaves out those that have not answered.
FindOwners = Callable[[Mapping[tuple[int, int], int], float], Mapping[tuple[int, int], Owner]]


def name_vm(owner: Owner, key: VmKey) -> str:
    """Return a VM's own identity: its UUID, else its VMM's id for it, else ``<vmm>-<pid>``."""
    return owner.uuid or owner.own_id or f"{owner.vmm}-{key.pid}"


def choose_ids(owners: Mapping[VmKey, Owner], taken: Mapping[VmKey, str]) -> dict[VmKey, str]:
    """Give each VM an id of its own.

    ``taken`` are ids given before: a VM keeps its id for life. Two VMs may claim one identity (clones, and several VMs
    of one process): the older keeps it, a younger one is ``<identity>-<pid>``, and where that is claimed too, further
    numbers tell them apart.
    """
    ids = {key: taken[key] for key in owners if key in taken}
    used = set(ids.values())
    for key in sorted(owners.keys() - ids.keys(), key=lambda key: (key.start_ticks, key.pid, key.vm_fd)):
        identity = name_vm(owners[key], key)
        candidates = [identity, f"{identity}-{key.pid}", f"{identity}-{key.pid}-{key.vm_fd}"]
        number = 0
        while candidates[0] in used:
            candidates = candidates[1:] or [f"{identity}-{key.pid}-{key.vm_fd}-{number}"]
            number += 1
        ids[key] = candidates[0]
        used.add(ids[key])
    return ids


class VmIds:
    """Keeps the identity of each VM. ``unix`` gives the time in seconds; ``proc`` is where proc is mounted."""

    def __init__(
        self,
        find_owners: FindOwners,
        errors: ReadErrors,
        proc: Path,
        unix: Callable[[], float] = time.time,
        wait_seconds: float = OWNER_WAIT_SECONDS,
    ) -> None:
        self._find_owners = find_owners
        self._errors = errors
        self._proc = proc
        self._wait_seconds = wait_seconds
        self.pending = 0
        """How many VMs were left out of the last answer, because whose they are is not known yet."""
        self._boot_unix_seconds = unix() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._vms: dict[VmKey, Vm] = {}
        self._tids: dict[tuple[int, int], int] = {}

    def identify(self, keys: Mapping[VmKey, int | None]) -> Mapping[VmKey, Vm]:
        """Return who these VMs are; ``keys`` has a living thread of each one's process, None where that is not known.

        A VM whose owner is not known yet is left out, and counted: with a wrong id its series would be another's.
        """
        self._vms = {key: vm for key, vm in self._vms.items() if key in keys}
        self._find_threads(keys)
        known = self._find_owners(self._tids, self._wait_seconds)
        owners = {key: known[key[:2]] for key in keys if key[:2] in known}
        pending = [key for key in keys.keys() - owners.keys() if self._is_alive(key)]
        self.pending = len(pending)
        for key in pending:
            self._errors.record("owners", key.pid, "pending", "whose VM it is has not been found out yet")
        new = owners.keys() - self._vms.keys()
        if new:
            ids = choose_ids(owners, {key: vm.id for key, vm in self._vms.items()})
            for key in new:
                if ids[key] != name_vm(owners[key], key):
                    message = f"another VM has its identity: this one is {ids[key]}"
                    self._errors.record("owners", key.pid, "duplicate", message)
                started = self._boot_unix_seconds + key.start_ticks / abi.USER_HZ
                self._vms[key] = Vm(ids[key], key, owners[key], round(started, 2))
        return self._vms

    def _is_alive(self, key: VmKey) -> bool:
        try:
            state, start_ticks = read_stat(self._proc, key.pid)
        except (OSError, MalformedData):
            return False
        return start_ticks == key.start_ticks and (state not in "ZX" or key[:2] in self._tids)

    def _find_threads(self, keys: Mapping[VmKey, int | None]) -> None:
        tids: dict[tuple[int, int], int] = {}
        for key, tid in keys.items():
            process = key[:2]
            try:
                tids[process] = tid or self._tids.get(process) or find_living_thread(self._proc, key.pid)
            except (OSError, MalformedData):
                continue  # it has ended: identify() counts it
        self._tids = tids
