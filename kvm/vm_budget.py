"""Bounds how many VMs of one process and of one user are shown: whoever may open /dev/kvm can make VMs by the thousand.

Each VM shown costs lines in every scrape, and time in every snapshot. No VMM comes near the first bound; the second is
meant for a user who runs all VMs of a host, as libvirt-qemu does. VMs beyond them are counted, and nobody
else's VMs are touched. A user's subordinate uids (subuid(5)) are users of their own here, as they are for the kernel.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from kvm.discovery.kvm_fds import MAX_VM_FDS
from kvm.discovery.processes import read_uid
from kvm.model import VmKey

log = logging.getLogger(__name__)

PROCESS_VMS = MAX_VM_FDS  # no more of one process are found by its fds
UID_VMS = 4096
# A user whose VMs come and go around the bound is logged once in this time.
QUIET_SECONDS = 3600.0
MAX_LOGGED = 1000

T = TypeVar("T")


class VmBudget:
    """Chooses which VMs are shown: of a process and a user those that were shown before, then the oldest.

    ``proc`` is where proc is mounted, ``clock`` gives seconds that only grow.
    """

    def __init__(
        self,
        proc: Path,
        clock: Callable[[], float],
        *,
        process_vms: int = PROCESS_VMS,
        uid_vms: int = UID_VMS,
        read_uid: Callable[[Path, int], int | None] = read_uid,
    ) -> None:
        self._proc, self._clock, self._read_uid = proc, clock, read_uid
        self._process_vms, self._uid_vms = process_vms, uid_vms
        self._asked: Collection[VmKey] = ()
        self._shown: frozenset[VmKey] = frozenset()
        self._over: frozenset[VmKey] = frozenset()
        self._over_uids: Counter[int | None] = Counter()
        self._over_at: dict[int | None, float] = {}

    @property
    def over(self) -> int:
        """How many VMs were left out of the last answer."""
        return len(self._over)

    def keep(self, vms: Mapping[VmKey, T]) -> dict[VmKey, T]:
        """Return the VMs that are shown, with what is known of them."""
        if vms.keys() != self._asked:
            self._asked = frozenset(vms)
            self._over_uids = self._choose(vms)
        self._log_new(self._over_uids)
        return {key: vm for key, vm in vms.items() if key not in self._over} if self._over else dict(vms)

    def _choose(self, keys: Iterable[VmKey]) -> Counter[int | None]:
        """Choose anew, and return how many VMs of each user are left out."""
        processes = defaultdict(list)
        for key in keys:
            processes[key[:2]].append(key)
        find_uid = cache(partial(self._read_uid, self._proc))
        over: list[VmKey] = []
        shown: dict[tuple[int, int], list[VmKey]] = {}
        for process, held in processes.items():
            if len(held) > self._process_vms:
                held.sort(key=self._rank)
                over += held[self._process_vms :]
            shown[process] = held[: self._process_vms]
        if sum(map(len, shown.values())) > self._uid_vms:
            over += self._find_over_uid(shown, find_uid)
        self._over = frozenset(over)
        self._shown = frozenset(self._asked) - self._over
        return Counter(find_uid(key.pid) for key in over)

    def _find_over_uid(
        self, shown: Mapping[tuple[int, int], list[VmKey]], find_uid: Callable[[int], int | None]
    ) -> list[VmKey]:
        users: defaultdict[int | None, list[VmKey]] = defaultdict(list)
        for process, held in shown.items():
            users[find_uid(process[0])] += held
        return [key for held in users.values() for key in sorted(held, key=self._rank)[self._uid_vms :]]

    def _rank(self, key: VmKey) -> tuple[bool, int, int, int]:
        return key not in self._shown, key.start_ticks, key.pid, key.vm_fd

    def _log_new(self, uids: Mapping[int | None, int]) -> None:
        if not uids:
            return
        now = self._clock()
        for uid, count in uids.items():
            if now - self._over_at.get(uid, float("-inf")) >= QUIET_SECONDS:
                fields = {"uid": "unknown" if uid is None else uid, "vms": count}
                fields |= {"process_budget": self._process_vms, "uid_budget": self._uid_vms}
                log.warning("a user has more VMs than are shown of one", extra={"fields": fields})
        kept = {uid: at for uid, at in self._over_at.items() if uid not in uids and now - at < QUIET_SECONDS}
        kept |= dict.fromkeys(uids, now)  # last, so that they stay longest
        self._over_at = dict(list(kept.items())[-MAX_LOGGED:])
