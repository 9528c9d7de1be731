"""Says which VM is which: an owner and an id for each, found out once and kept for the VM's life."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path

from kvm import abi
from kvm.discovery.processes import find_living_thread, process_exists, read_stat
from kvm.errors import MalformedData
from kvm.model import Owner, Vm, VmKey
from kvm.read_errors import ReadErrors

# New VMs' owners are waited for this long: reading a command line takes microseconds, unless its process hangs.
OWNER_WAIT_SECONDS = 1.0
# A clock that is slewed and not stepped stays below this between two snapshots.
CLOCK_STEP_SECONDS = 1.0
# So many processes whose VMs share an identity are remembered, though they have ended.
MAX_CONFLICTS = 10_000
# The agent's own process name; the kernel keeps 15 bytes.
AGENT_COMM = "kvm-notify-exporter"[:15]

# Whose VMs are these processes, given a living thread of each (pid, start_ticks)? Waits so many seconds at most, and
# leaves out those that have not answered.
FindOwners = Callable[[Mapping[tuple[int, int], int], float], Mapping[tuple[int, int], Owner]]


def name_vm(owner: Owner, key: VmKey) -> str:
    """Return the id that is a VM's whoever else is alive: its UUID, or its VMM's id for it, with or without its pid.

    Without, where the host's manager vouches for it. Else it is ``<uuid>-<pid>``, so that no other process can take
    over a VM's id and its series; where there is neither UUID nor id, ``<vmm>-<pid>``.
    """
    identity = owner.uuid or owner.own_id
    if identity and owner.identity.is_unique:
        return identity
    return f"{identity or owner.vmm}-{key.pid}"


def choose_ids(owners: Mapping[VmKey, Owner], taken: Mapping[VmKey, str]) -> dict[VmKey, str]:
    """Give each VM an id of its own.

    ``taken`` are ids given before: a VM keeps its id for life. Several VMs of one process, and VMs whose managers vouch
    for one UUID (clones), share an identity: the oldest keeps it, a younger one is ``<identity>-<pid>``, and where that
    is taken too, further numbers tell them apart.
    """
    ids = {key: taken[key] for key in owners if key in taken}
    used = set(ids.values())
    for key in sorted(owners.keys() - ids.keys(), key=lambda key: (key.start_ticks, key.pid, key.vm_fd)):
        identity = name_vm(owners[key], key)
        with_pid = identity if identity.endswith(f"-{key.pid}") else f"{identity}-{key.pid}"
        candidates = [identity, with_pid, f"{with_pid}-{key.vm_fd}"]
        number = 0
        while candidates[0] in used:
            candidates = candidates[1:] or [f"{with_pid}-{key.vm_fd}-{number}"]
            number += 1
        ids[key] = candidates[0]
        used.add(ids[key])
    return ids


def is_agents(owner: Owner) -> bool:
    """Tell whether a VM is what an agent, this one or another, makes for a moment to learn what KVM looks like.

    A process name is a claim, and would hide a VM: only that of a process of root's, or of our own user, counts.
    """
    return owner.vmm == AGENT_COMM and owner.uid in (0, os.getuid())


def _read_boot_time(unix: Callable[[], float]) -> float:
    """Return the Unix time at which CLOCK_BOOTTIME, in which start times are told, was 0."""
    return unix() - time.clock_gettime(time.CLOCK_BOOTTIME)


class _Presence(Enum):
    """What is known of a VM's process. One that is hidden must not be taken for one that has ended."""

    ALIVE = 1
    HIDDEN = 2
    ENDED = 3


class VmIds:
    """Keeps the identity of each VM. ``unix`` gives the time in seconds; ``proc`` is where proc is mounted."""

    def __init__(
        self,
        find_owners: FindOwners,
        errors: ReadErrors,
        proc: Path,
        unix: Callable[[], float] = time.time,
        *,
        wait_seconds: float = OWNER_WAIT_SECONDS,
        exists: Callable[[int], bool] = process_exists,
    ) -> None:
        self._exists = exists
        self._find_owners = find_owners
        self._errors = errors
        self._proc = proc
        self._wait_seconds = wait_seconds
        self.pending = 0
        """How many VMs were left out of the last answer, because whose they are is not known yet."""
        self.hidden = 0
        """How many were left out because /proc does not show their processes, which exist."""
        self._unix = unix
        self._boot_unix_seconds = _read_boot_time(unix)
        self._vms: dict[VmKey, Vm] = {}
        self._identified: Mapping[VmKey, Vm] = {}
        self._settled: frozenset[VmKey] | None = None
        """The VMs of the last answer if nothing about them was left to find out."""
        self._tids: dict[tuple[int, int], int] = {}
        self._conflicts: dict[tuple[int, int], None] = {}

    def identify(self, keys: Mapping[VmKey, int | None]) -> Mapping[VmKey, Vm]:
        """Return who these VMs are, in the order of their ids.

        ``keys`` has a living thread of each one's process, None where that is not known.

        A VM whose owner is not known yet is left out, and counted: with a wrong id its series would be another's.
        """
        self._follow_clock()
        if self._settled is not None and keys.keys() == self._settled:
            # The same VMs as before, all of them known: 0.2 ms instead of 1.0 for 625 VMs. Lookups that hang, of
            # processes that have ended, still have to be given up on.
            self._find_owners(self._tids, self._wait_seconds)
            return self._identified
        self._vms = {key: vm for key, vm in self._vms.items() if key in keys}
        self._find_threads(keys)
        known = self._find_owners(self._tids, self._wait_seconds)
        owners = {key: known[key[:2]] for key in keys if key[:2] in known}
        unknown = {key: self._look_at(key) for key in keys.keys() - owners.keys()}
        self.hidden = sum(presence is _Presence.HIDDEN for presence in unknown.values())
        pending = [key for key, presence in unknown.items() if presence is _Presence.ALIVE]
        self.pending = len(pending)
        for key in pending:
            self._errors.record("owners", key, "pending", "whose VM it is has not been found out yet")
        new = owners.keys() - self._vms.keys()
        if new:
            ids = choose_ids(owners, {key: vm.id for key, vm in self._vms.items()})
            for key in new:
                if ids[key] != name_vm(owners[key], key):
                    self._note_conflict(key, ids[key])
                self._vms[key] = Vm(ids[key], key, owners[key], self._find_start(key))
        self._settled = None if unknown else frozenset(keys)
        found = [(key, vm) for key, vm in self._vms.items() if not is_agents(vm.owner)]
        self._identified = dict(sorted(found, key=lambda item: item[1].id))
        return self._identified

    def _note_conflict(self, key: VmKey, vm_id: str) -> None:
        """Record a conflict once for each process: one that goes on making VMs of one identity is one condition."""
        if key[:2] not in self._conflicts:
            self._errors.record("owners", key, "duplicate", f"another VM has its identity: this one is {vm_id}")
            self._conflicts[key[:2]] = None
            if len(self._conflicts) > MAX_CONFLICTS:
                del self._conflicts[next(iter(self._conflicts))]

    def _follow_clock(self) -> None:
        """Tell start times anew after a step of the clock, as by NTP some time after boot."""
        boot = _read_boot_time(self._unix)
        if abs(boot - self._boot_unix_seconds) < CLOCK_STEP_SECONDS:
            return
        self._boot_unix_seconds = boot
        self._vms = {key: replace(vm, start_time_seconds=self._find_start(key)) for key, vm in self._vms.items()}
        self._settled = None

    def _find_start(self, key: VmKey) -> float:
        return round(self._boot_unix_seconds + key.start_ticks / abi.USER_HZ, 2)

    def _look_at(self, key: VmKey) -> _Presence:
        try:
            state, start_ticks = read_stat(self._proc, key.pid)
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE):
                return _Presence.ALIVE  # it is for us that it cannot be read: the next snapshot tells
            return _Presence.HIDDEN if self._exists(key.pid) else _Presence.ENDED
        except MalformedData:
            return _Presence.ENDED
        is_alive = start_ticks == key.start_ticks and (state not in "ZX" or key[:2] in self._tids)
        return _Presence.ALIVE if is_alive else _Presence.ENDED

    def _find_threads(self, keys: Mapping[VmKey, int | None]) -> None:
        tids: dict[tuple[int, int], int] = {}
        for key, tid in keys.items():
            process = key[:2]
            try:
                tids[process] = tid or self._tids.get(process) or find_living_thread(self._proc, key.pid)
            except (OSError, MalformedData):
                continue  # it has ended: identify() counts it
        self._tids = tids
