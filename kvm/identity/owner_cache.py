"""Keeps whose VM each process is; a lookup that hangs holds up nobody else."""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from kvm.discovery.processes import read_uid
from kvm.errors import VmGone
from kvm.identity.evidence import CGROUPS
from kvm.identity.lookup_process import LookupFailed, LookupPlaces, LookupProcess
from kvm.identity.owners import LIBVIRT_DIRECTORIES, OwnerReading, read_program
from kvm.identity.vmm_cmdline import parse_cmdline
from kvm.model import Owner

# A child that was killed is gone after a millisecond, unless the kernel lets it wait.
END_SECONDS = 0.2

Key = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Lookup:
    """One process whose owner is looked for; ``reading`` is None until it is known."""

    pid: int
    start_ticks: int
    tid: int
    uid: int | None = None
    fallback: Owner | None = None
    reading: OwnerReading | None = None
    is_queued: bool = False
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Child:
    """A lookup process, and what it was asked since when (or has been ready for); None while it has nothing to do."""

    process: LookupProcess
    lookup: _Lookup | None = None
    since: float = 0.0


class OwnerCache:
    """Remembers whose VM each process is, and looks new ones up in child processes.

    Reading a command line or a file of a VM's mount namespace can hang for ever, so the agent itself never does it. One
    child does all the work as long as it answers. A child that has been at one process for ``STUCK_SECONDS`` is passed
    over and another takes its place, up to ``CHILDREN`` in all and ``CHILDREN_OF_A_UID`` at processes of one uid: who
    makes lookups hang runs into that limit alone. After ``give_up_seconds`` at one process the child is killed, and
    the process is known by its program's name only, for as long as it lives: an id that changes is worse than a poor
    one. A process whose lookup has not begun is never given up on: a child that is still starting, as it may on a
    machine that has no time for it, is waited for, and has not hung.

    ``on_error`` is told what could not be read, (pid, kind, message), once a process and kind. ``proc`` is where proc
    is mounted, ``clock`` gives seconds that only grow. Use it from one thread at a time.
    """

    STUCK_SECONDS = 0.25
    BUSY_CHILDREN = 2
    CHILDREN = 16
    CHILDREN_OF_A_UID = 3
    START_SECONDS = 60.0
    # A child that dies at one process, as out of memory, or that does not start, gets it this often.
    TRIES = 3

    def __init__(
        self,
        on_error: Callable[[int, str, str], None],
        *,
        proc: Path = Path("/proc"),
        libvirt_directories: Sequence[Path] = LIBVIRT_DIRECTORIES,
        cgroups: Path = CGROUPS,
        clock: Callable[[], float] = time.monotonic,
        give_up_seconds: float = 10.0,
    ) -> None:
        self._on_error = on_error
        self._proc = proc
        self._places = LookupPlaces(proc, cgroups, tuple(libvirt_directories))
        self._clock = clock
        self._give_up_seconds = give_up_seconds
        self._lookups: dict[Key, _Lookup] = {}
        self._queue: list[_Lookup] = []
        self._children: list[_Child] = []
        self._settled: tuple[Mapping[Key, int], dict[Key, Owner]] | None = None
        """The last question and its answers, if all of them are known."""
        self._left_behind: list[tuple[LookupProcess, int | None]] = []
        """Killed, with the uid of the process that they hang at; some do not die as long as the kernel waits."""

    @property
    def children(self) -> int:
        """How many lookup processes there are, those that were left behind and live on included."""
        return len(self._children) + len(self._left_behind)

    def find(self, wanted: Mapping[Key, int], wait_seconds: float) -> dict[Key, Owner]:
        """Return the owners that are known, of processes given as {(pid, start_ticks): a living thread}.

        Waits at most ``wait_seconds``, and only for processes that were not asked for before, or whose turn has not
        come yet, as where an agent starts on a host with thousands: one that hangs delays its first snapshot and no
        other, and while it hangs nobody waits for others of its uid. Processes that are not wanted any more are
        forgotten.
        """
        if self._settled and self._settled[0] == wanted and self._is_at_rest:
            return self._settled[1]
        new = self._note_wanted(wanted)
        deadline = self._clock() + wait_seconds
        while True:
            self._receive(0.0)
            self._give_up_on_hung()
            self._ask()
            left = deadline - self._clock()
            if left <= 0 or not self._are_worth_waiting_for(new):
                break
            self._receive(min(left, self.STUCK_SECONDS))
        self._end_idle_children()
        found = {}
        for key, lookup in self._lookups.items():
            reading = lookup.reading
            if reading is None:
                continue
            found[key] = reading.owner
            if reading.problems:
                for problem in reading.problems:
                    self._on_error(lookup.pid, *problem)
                lookup.reading = reading._replace(problems=())
        self._settled = (dict(wanted), found) if len(found) == len(wanted) else None
        return found

    def close(self) -> None:
        """End every lookup process, and wait for none that hangs."""
        for child in list(self._children):
            self._leave(child)
        deadline = time.monotonic() + END_SECONDS
        for process, _uid in self._left_behind:
            process.wait(max(0.0, deadline - time.monotonic()))
        self._queue = []

    @property
    def _is_at_rest(self) -> bool:
        """Whether no lookup is under way, nor is one left to bury: nearly always."""
        return not (self._queue or self._left_behind or any(child.lookup for child in self._children))

    def _note_wanted(self, wanted: Mapping[Key, int]) -> list[_Lookup]:
        for key in self._lookups.keys() - wanted.keys():
            del self._lookups[key]
        self._queue = [lookup for lookup in self._queue if (lookup.pid, lookup.start_ticks) in self._lookups]
        new = []
        for key, tid in wanted.items():
            lookup = self._lookups.get(key)
            if lookup is None:
                lookup = self._lookups[key] = _Lookup(*key, tid)
                new.append(lookup)
            if lookup.reading is None and not lookup.is_queued:  # new, or seemed to be ending when it was looked up
                lookup.tid, lookup.is_queued = tid, True
                self._queue.append(lookup)
        return new

    def _are_worth_waiting_for(self, new: Sequence[_Lookup]) -> bool:
        """Tell whether one of them, or one whose turn comes, may have its answer soon.

        Whoever makes lookups hang makes nobody wait twice; and no turn comes where no child gets on.
        """
        now = self._clock()
        at_work = [child for child in self._children if child.lookup]
        stuck = [child for child in at_work if child.process.is_ready and now - child.since >= self.STUCK_SECONDS]
        hung_uids = {uid for process, uid in self._left_behind if not process.has_ended}
        hung_uids |= {child.lookup.uid for child in stuck if child.lookup}
        return any(
            lookup.reading is None and lookup.is_queued and (lookup.uid is None or lookup.uid not in hung_uids)
            for lookup in chain(new, self._queue if len(stuck) < len(at_work) else ())
        )

    def _ask(self) -> None:
        """Give what waits to children that have nothing to do, and start some where there is room."""
        self._left_behind = [(process, uid) for process, uid in self._left_behind if not process.has_ended]
        at_uid = Counter(child.lookup.uid for child in self._children if child.lookup)
        at_uid.update(uid for _process, uid in self._left_behind)
        waiting, self._queue = self._queue, []
        for number, lookup in enumerate(waiting):
            if lookup.uid is None:
                lookup.uid = read_uid(self._proc, lookup.pid)
            if at_uid[lookup.uid] >= self.CHILDREN_OF_A_UID:
                self._queue.append(lookup)
                continue
            child = self._find_child(lookup)
            if child is None:
                self._queue += waiting[number:]
                return
            at_uid[lookup.uid] += 1
            self._begin(child, lookup)

    def _find_child(self, lookup: _Lookup) -> _Child | None:
        for child in [child for child in self._children if child.lookup is None]:
            if not child.process.has_ended:
                return child
            self._leave(child)
        now = self._clock()
        busy = sum(not child.process.is_ready or now - child.since < self.STUCK_SECONDS for child in self._children)
        if busy >= self.BUSY_CHILDREN or self.children >= self.CHILDREN:
            return None
        try:
            self._children.append(_Child(LookupProcess(self._places)))
        except OSError as err:  # no process or no fd is left
            self._on_error(lookup.pid, "unstarted", f"no process to look for its owner: {err}")
            return None
        return self._children[-1]

    def _begin(self, child: _Child, lookup: _Lookup) -> None:
        child.lookup, child.since = lookup, self._clock()
        lookup.tries += 1
        with suppress(VmGone):  # then the child finds out as well
            # Neither comm nor the link of exe takes the mmap_lock.
            program = read_program(self._proc, lookup.pid, lookup.tid)
            lookup.fallback = replace(parse_cmdline((), *program), uid=lookup.uid)
        try:
            child.process.ask(lookup.pid, lookup.tid, lookup.start_ticks)
        except LookupFailed as err:
            self._drop(child, str(err))

    def _receive(self, wait_seconds: float) -> None:
        """Take the answers that have come, or come within so many seconds, or until a killed child has made room."""
        poll = select.poll()
        asked = {child.process.fd: child for child in self._children if child.lookup}
        for fd in asked:
            poll.register(fd, select.POLLIN)
        with ExitStack() as stack:
            for process, _uid in self._left_behind if wait_seconds else ():
                with suppress(OSError):  # no fd is left: then what it makes room for waits a little longer
                    pidfd = process.open_pidfd()
                    stack.callback(os.close, pidfd)
                    poll.register(pidfd, select.POLLIN)
            ready = [fd for fd, _event in poll.poll(wait_seconds * 1000) if fd in asked]
        for fd in ready:
            child = asked[fd]
            lookup, was_ready = child.lookup, child.process.is_ready
            assert lookup is not None
            try:
                is_there, reading = child.process.read_answer(lookup.start_ticks)
            except LookupFailed as err:
                self._drop(child, str(err))
                continue
            if child.process.is_ready and not was_ready:
                child.since = self._clock()
            if is_there:
                lookup.reading, lookup.is_queued, child.lookup = reading, False, None

    def _drop(self, child: _Child, reason: str) -> None:
        """Take a child out of use that has ended; what it was asked is asked again, but not for ever."""
        lookup = child.lookup
        assert lookup is not None
        self._leave(child)
        if lookup.tries < self.TRIES:
            self._queue.append(lookup)
            return
        lookup.reading, lookup.is_queued = OwnerReading(_fall_back(lookup)), False
        self._on_error(lookup.pid, "unreadable", f"{reason}, {self.TRIES} times; it stays without name")

    def _leave(self, child: _Child) -> None:
        child.process.leave()
        self._children.remove(child)
        if not child.process.has_ended:
            self._left_behind.append((child.process, child.lookup.uid if child.lookup else None))

    def _give_up_on_hung(self) -> None:
        now = self._clock()
        for child in [child for child in self._children if child.lookup]:
            lookup = child.lookup
            assert lookup is not None
            if not child.process.is_ready:
                if now - child.since >= self.START_SECONDS:
                    self._drop(child, f"the lookup process did not start within {self.START_SECONDS:g} s")
                continue
            is_wanted = self._lookups.get((lookup.pid, lookup.start_ticks)) is lookup
            if now - child.since < (self._give_up_seconds if is_wanted else self.STUCK_SECONDS):
                continue
            self._leave(child)
            lookup.reading, lookup.is_queued = OwnerReading(_fall_back(lookup)), False
            if is_wanted:
                reason = f"whose VM it is could not be read within {self._give_up_seconds:g} s; it stays without name"
                self._on_error(lookup.pid, "hung", reason)

    def _end_idle_children(self) -> None:
        """Keep one child for the next VM, and no more."""
        for child in [child for child in self._children if child.lookup is None][1:]:
            self._leave(child)


def _fall_back(lookup: _Lookup) -> Owner:
    return lookup.fallback or Owner(vmm="unknown", uid=lookup.uid)
