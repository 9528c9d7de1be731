"""Keeps whose VM each process is; a look-up that hangs holds up nobody else."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvm.discovery.processes import read_stat
from kvm.errors import MalformedData, VmGone
from kvm.identity.owners import LIBVIRT_DIRECTORIES, OwnerReading, Problem, read_owner, read_program
from kvm.identity.vmm_cmdline import parse_cmdline
from kvm.model import Owner


@dataclass(slots=True, eq=False)
class _Lookup:
    """One process whose owner is looked for; ``reading`` is None until it is known."""

    pid: int
    start_ticks: int
    tid: int
    wanted_at: float
    started_at: float | None = None
    is_under_way: bool = False
    is_wanted: bool = True
    fallback: Owner = field(default_factory=lambda: Owner(vmm="unknown"))
    reading: OwnerReading | None = None


class OwnerCache:
    """Remembers whose VM each process is, and looks new ones up in threads of its own.

    Reading a command line can hang (the process's mmap_lock, a file system of its own), so no caller ever does it. A
    thread ends when there is nothing to look up. One that has been at one process for ``STUCK_SECONDS`` no longer
    counts, and another takes its place, up to ``THREADS`` in all. After ``give_up_seconds`` a process that has not
    answered is known by its program's name only, and stays so: an identity that changes is worse than a poor one.

    ``on_error`` is told what could not be read, (pid, kind, message), once a process and kind, always in the thread
    that calls ``find``. ``proc`` is where proc is mounted, ``clock`` gives seconds that only grow.
    """

    STUCK_SECONDS = 0.25
    BUSY_THREADS = 4
    THREADS = 32

    def __init__(
        self,
        on_error: Callable[[int, str, str], None],
        *,
        proc: Path = Path("/proc"),
        libvirt_directories: Sequence[Path] = LIBVIRT_DIRECTORIES,
        clock: Callable[[], float] = time.monotonic,
        give_up_seconds: float = 10.0,
    ) -> None:
        self._on_error = on_error
        self._proc = proc
        self._libvirt_directories = tuple(libvirt_directories)
        self._clock = clock
        self._give_up_seconds = give_up_seconds
        self._changed = threading.Condition()
        self._lookups: dict[tuple[int, int], _Lookup] = {}
        self._queue: deque[_Lookup] = deque()
        self._problems: list[tuple[int, str, str]] = []
        self._threads: dict[threading.Thread, float | None] = {}  # since when each is at its present process

    def find(self, wanted: Mapping[tuple[int, int], int], wait_seconds: float) -> dict[tuple[int, int], Owner]:
        """Return the owners that are known, of processes given as {(pid, start_ticks): a living thread}.

        Waits at most ``wait_seconds``, and only for processes that were not asked for before: one that hangs delays
        its first look and no other. Processes that are not wanted any more are forgotten.
        """
        with self._changed:
            new = self._note_wanted(wanted)
            deadline = self._clock() + wait_seconds
            self._start_threads()
            while any(lookup.reading is None and lookup.is_under_way for lookup in new):
                left = deadline - self._clock()
                if left <= 0:
                    break
                self._changed.wait(min(left, self.STUCK_SECONDS))
                self._start_threads()
            self._give_up_on_hung()
            found = {}
            for key, lookup in self._lookups.items():
                if lookup.reading is not None:
                    found[key] = lookup.reading.owner
                    self._problems += [(lookup.pid, *problem) for problem in lookup.reading.problems]
                    lookup.reading = lookup.reading._replace(problems=())
            problems, self._problems = self._problems, []
        for problem in problems:
            self._on_error(*problem)
        return found

    def _note_wanted(self, wanted: Mapping[tuple[int, int], int]) -> list[_Lookup]:
        for key in self._lookups.keys() - wanted.keys():
            self._lookups.pop(key).is_wanted = False
        new = []
        for key, tid in wanted.items():
            lookup = self._lookups.get(key)
            if lookup is None:
                lookup = self._lookups[key] = _Lookup(*key, tid, self._clock())
                new.append(lookup)
            if lookup.reading is None and not lookup.is_under_way:  # new, or seemed to be ending when it was looked up
                lookup.tid, lookup.is_under_way, lookup.started_at = tid, True, None
                self._queue.append(lookup)
        return new

    def _start_threads(self) -> None:
        now = self._clock()
        busy = sum(since is None or now - since < self.STUCK_SECONDS for since in self._threads.values())
        room = min(self.BUSY_THREADS - busy, self.THREADS - len(self._threads), len(self._queue))
        for _ in range(room):
            thread = threading.Thread(target=self._work, name="owners", daemon=True)
            self._threads[thread] = None
            try:
                thread.start()
            except RuntimeError as err:  # the process may have no more threads
                del self._threads[thread]
                self._problems.append((self._queue[0].pid, "threads", f"no thread to look for its owner: {err}"))
                return

    def _work(self) -> None:
        thread = threading.current_thread()
        try:
            while lookup := self._next_lookup(thread):
                reading = self._look_up(lookup)
                with self._changed:
                    if lookup.reading is None:  # else it was given up on, and that stays
                        lookup.reading = reading
                    lookup.is_under_way = False
                    if not self._queue:
                        self._changed.notify_all()
        finally:
            with self._changed:
                self._threads.pop(thread, None)

    def _next_lookup(self, thread: threading.Thread) -> _Lookup | None:
        with self._changed:
            while self._queue:
                lookup = self._queue.popleft()
                if lookup.is_wanted and lookup.reading is None:
                    self._threads[thread] = lookup.started_at = self._clock()
                    return lookup
            # In the same breath as finding nothing: what is queued from now on needs another thread.
            del self._threads[thread]
        return None

    def _look_up(self, lookup: _Lookup) -> OwnerReading | None:
        """Return what is read of a process, None where it has ended or is ending."""
        try:
            comm, executable = read_program(self._proc, lookup.pid, lookup.tid)
            lookup.fallback = parse_cmdline((), comm, executable)
            reading = read_owner(self._proc, lookup.pid, lookup.tid, self._libvirt_directories)
            # The number may have passed on to another process before anything was read.
            is_same = read_stat(self._proc, lookup.pid).start_ticks == lookup.start_ticks
        except (VmGone, MalformedData, OSError):
            return None
        except Exception as err:  # noqa: BLE001 - a thread that dies takes with it whoever waits for its answer
            return OwnerReading(lookup.fallback, (Problem("unreadable", repr(err)),))
        return reading if is_same else None

    def _give_up_on_hung(self) -> None:
        now = self._clock()
        are_all_stuck = len(self._threads) >= self.THREADS
        for lookup in self._lookups.values():
            since = lookup.started_at if lookup.started_at is not None or not are_all_stuck else lookup.wanted_at
            if lookup.reading is None and since is not None and now - since >= self._give_up_seconds:
                lookup.reading = OwnerReading(lookup.fallback)
                reason = f"its command line could not be read within {self._give_up_seconds:g} s; it stays without name"
                self._problems.append((lookup.pid, "hung", reason))
