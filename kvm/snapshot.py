"""Takes one snapshot of the whole host: asks the sources in order, and says how each went.

The best source that works has the first word on every VM; the next one is asked only for what is left. A source that
does not work is tried again now and then, not at every snapshot: under lockdown each try writes to the kernel log. Each
source is tried at the first snapshot, so that what works is known of all, and the next one is ready when needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kvm.blind_spots import REFUSED_PROCESSES, BlindSpotLog, Evidence, find_blind_spots
from kvm.counters.debugfs import find_vm_directory, may_hold_vms, read_vcpu_tids
from kvm.counters.retried_source import RETRY_SECONDS, RetriedSource
from kvm.counters.source import CounterSource
from kvm.discovery.vm_discovery import Discovery
from kvm.errors import SourceUnavailable
from kvm.host import facts
from kvm.identity.vcpu_index import number_vcpus, read_index
from kvm.identity.vm_ids import OWNER_WAIT_SECONDS, FindOwners, VmIds
from kvm.model import Host, Snapshot, Vcpu, Vm, VmCounters, VmKey, VmReading
from kvm.protection import judge_protection
from kvm.read_errors import ReadErrors
from kvm.vm_budget import VmBudget

log = logging.getLogger(__name__)

# A vCPU that has not run yet has no thread. Asking for it again costs a file read a vCPU, so it is done for a VM every
# so often, and for so many VMs a snapshot.
THREADS_SECONDS = 10.0
THREADS_VMS = 20


class _Answer(NamedTuple):
    """What was read of one VM, by which source, and what else is known of it.

    ``all_vcpu_ids`` are its vCPUs, read or not (None: not known); ``tid`` is a living thread of its process;
    ``knows_threads`` says that a vCPU without a thread has none, so that nobody need look for it.
    """

    source: str
    counters: VmCounters
    all_vcpu_ids: tuple[int, ...] | None
    tid: int | None
    knows_threads: bool


class _KeptVm:
    """What is kept of a VM: its vCPUs with their numbers, as long as ``known``, from which they follow, is the same.

    ``reading`` is the last one, judged by what ``host`` supports.
    """

    __slots__ = ("host", "known", "looked_at", "reading", "vcpus")

    def __init__(self) -> None:
        self.vcpus: tuple[Vcpu, ...] = ()
        self.known: tuple[object, ...] | None = None
        self.looked_at = float("-inf")
        self.host: Host | None = None
        self.reading: VmReading | None = None


def _differ_in_numbers_only(one: VmCounters, other: VmCounters) -> bool:
    """Tell whether two of a VM's counters are surely of the same vCPUs, in the same threads, equally protected."""
    return one.vcpu_ids is other.vcpu_ids and one.tids is other.tids and one.notify_flags == other.notify_flags


def _read_mark(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_rdev


class HostReader:
    """The SnapshotReader of a real host. ``sources`` come in order of preference; it closes them at the end.

    ``monotonic`` and ``unix`` are clocks in seconds; new VMs' owners are waited for ``owner_wait_seconds``;
    ``kvm_debugfs`` is where vCPU threads are looked up if the source does not know them.
    """

    def __init__(
        self,
        sources: Sequence[CounterSource],
        discovery: Discovery,
        find_owners: FindOwners,
        errors: ReadErrors,
        *,
        proc: Path = Path("/proc"),
        kvm_debugfs: Path = Path("/sys/kernel/debug/kvm"),
        kvm_module: Path = Path("/sys/module/kvm"),
        kvm_device: Path = Path("/dev/kvm"),
        read_host: Callable[[], Host] = facts.read_host,
        owner_wait_seconds: float = OWNER_WAIT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._sources = [RetriedSource(source) for source in sources]
        self._discovery = discovery
        self._identities = VmIds(find_owners, errors, proc, unix, wait_seconds=owner_wait_seconds)
        self._budget = VmBudget(proc, monotonic)
        self._errors = errors
        self._proc = proc
        self._kvm_debugfs = kvm_debugfs
        self._read_host = read_host
        self._monotonic = monotonic
        self._unix = unix
        self._host_read_at = float("-inf")
        self._cpu_told = ""
        self._kvm_module, self._kvm_device = kvm_module, kvm_device
        self._kvm_marks: tuple[tuple[int, int] | None, ...] | None = None
        self._kvm_changes = 0
        self._kept: dict[VmKey, _KeptVm] = {}
        self._thread_lookups_left = 0
        self._all_tried = False
        self._blind_spot_log = BlindSpotLog()
        self._over_budget = 0

    def read(self) -> Snapshot:
        """Take a snapshot; what cannot be read is left out, reported and counted."""
        now, unix = self._monotonic(), self._unix()
        self._follow_kvm()
        if now - self._host_read_at >= RETRY_SECONDS:  # microcode can be updated while the host runs
            self._host, self._host_read_at = self._read_host(), now
            if self._host.cpu_unknown_reason and self._host.cpu_unknown_reason != self._cpu_told:
                fields = {"reason": self._host.cpu_unknown_reason}
                log.warning("CPU and microcode of this host are not known", extra={"fields": fields})
            self._cpu_told = self._host.cpu_unknown_reason
        answers = self._read_counters(now)
        vms = self._identities.identify({key: answer.tid for key, answer in answers.items()})
        if answers.keys() != self._kept.keys():
            self._kept = {key: self._kept.get(key) or _KeptVm() for key in answers}
        self._thread_lookups_left = THREADS_VMS
        readings = [self._assemble(vm, answers[key], now) for key, vm in vms.items()]
        for reading in readings:
            if not reading.source:
                self._errors.record("none", reading.vm.key, "unread", reading.counters.problem)
        self._errors.log_new(vms.values())
        blind_spots = find_blind_spots(self._find_evidence())
        self._blind_spot_log.log_new(blind_spots, now)
        return Snapshot(
            monotonic_seconds=now,
            unix_seconds=unix,
            host=self._host,
            readings=tuple(readings),
            sources=tuple(kept.report() for kept in self._sources),
            errors=self._errors.counts,
            blind_spots=blind_spots,
            vms_over_budget=self._over_budget,
            kvm_changes=self._kvm_changes,
        )

    def close(self) -> None:
        """Close the sources and what discovery holds."""
        for kept in self._sources:
            kept.source.close()
        self._discovery.close()

    def _follow_kvm(self) -> None:
        """Try every source anew, at once, where the kvm module or its device has come, gone or been replaced."""
        marks = tuple(_read_mark(path) for path in (self._kvm_module, self._kvm_device))
        if marks != self._kvm_marks:
            for kept in self._sources:
                kept.start_anew()
            self._all_tried = False
            self._host_read_at = float("-inf")
            self._kvm_changes += 1
        self._kvm_marks = marks

    def _find_evidence(self) -> Evidence:
        open_sources = [kept.source for kept in self._sources if kept.is_up]
        finds_vms = any(source.finds_vms for source in open_sources)
        # A security module may hide some processes' fds even from root; debugfs tells whether they made VMs.
        refused = self._discovery.refused
        asks = not finds_vms and len(refused) <= REFUSED_PROCESSES
        return Evidence(
            initial_pid_namespace=self._host.initial_pid_namespace,
            works=bool(open_sources),
            finds_vms=finds_vms,
            pending=self._identities.pending,
            hidden=self._identities.hidden,
            over_budget=self._over_budget,
            sees_first_process=finds_vms or self._discovery.sees_first_process is not False,
            refused=len(refused),
            refused_may_hold_vms=asks and may_hold_vms(self._kvm_debugfs, self._proc, refused),
        )

    def _read_counters(self, now: float) -> dict[VmKey, _Answer]:
        """Ask the sources in order, each only for the VMs that no better one has read."""
        answers: dict[VmKey, _Answer] | None = None
        if not self._all_tried:
            self._all_tried = True
            for kept in self._sources:
                kept.ensure_open(now)
        for kept in self._sources:
            if not kept.ensure_open(now):
                continue
            if kept.source.finds_vms and answers is None:
                try:
                    found = self._budget.keep(kept.source.read(()))
                except SourceUnavailable as err:
                    kept.fail(err)
                    continue
                self._over_budget, name = self._budget.over, kept.source.name
                return {key: _Answer(name, counters, counters.vcpu_ids, None, True) for key, counters in found.items()}
            answers = answers if answers is not None else self._find_unread()
            try:
                self._ask(kept.source, answers)
            except SourceUnavailable as err:
                kept.fail(err)
        return answers if answers is not None else self._find_unread()

    def _find_unread(self) -> dict[VmKey, _Answer]:
        unread = VmCounters(problem="no source works")
        # Before they are read: what is over budget is to cost nothing more.
        self._held = self._budget.keep({vm.key: vm for vm in self._discovery.find_vms()})
        self._over_budget = self._budget.over + self._discovery.vms_left_out
        return {key: _Answer("", unread, vm.vcpu_ids, vm.tid, False) for key, vm in self._held.items()}

    def _ask(self, source: CounterSource, answers: dict[VmKey, _Answer]) -> None:
        """Ask a source for the VMs that are not read yet; those that have ended go out of ``answers``."""
        asked = [key for key, answer in answers.items() if not answer.source]
        read = dict(source.read([self._held[key] for key in asked])) if asked else {}
        missing = [key for key in asked if key not in read]
        if missing:
            # It has ended, or its fds are others by now: a leader thread that exits takes the fds with it.
            again = [vm for vm in self._discovery.scan_again(key.pid for key in missing) if vm.key in missing]
            self._held |= {vm.key: vm for vm in again}
            if again:
                read |= source.read(again, again=True)
            changed = VmCounters(problem="its fds change faster than they can be read")
            read |= {vm.key: changed for vm in again if vm.key not in read}
        for key in asked:
            if key not in read:
                del answers[key]
                continue
            counters, known = read[key], answers[key].all_vcpu_ids
            ids = set(counters.vcpu_ids) | set(known or ())
            answers[key] = answers[key]._replace(
                source=source.name if counters.per_vcpu or counters.totals else "",
                counters=counters,
                all_vcpu_ids=tuple(sorted(ids)) if ids else known,
                tid=self._held[key].tid,
            )

    def _assemble(self, vm: Vm, answer: _Answer, now: float) -> VmReading:
        kept, counters = self._kept[vm.key], answer.counters
        before = kept.reading
        # A source that knows all of a VM gives the same objects for what has not changed of it: then nothing, or only
        # numbers, need be looked at.
        if before is not None and answer.knows_threads and before.vm is vm and kept.host is self._host:
            if before.counters is counters and before.source == answer.source:
                return before
            if _differ_in_numbers_only(before.counters, counters) and before.source == answer.source:
                kept.reading = VmReading(
                    vm, before.source, before.vcpus, before.vcpu_count, counters, before.protection
                )
                return kept.reading
        kept.host = self._host
        kept.reading = VmReading(
            vm=vm,
            source=answer.source,
            vcpus=self._number(kept, vm, answer, now),
            vcpu_count=len(answer.all_vcpu_ids) if answer.all_vcpu_ids is not None else None,
            counters=counters,
            protection=judge_protection(self._host.notify_supported, counters.notify_flags),
        )
        return kept.reading

    def _number(self, kept: _KeptVm, vm: Vm, answer: _Answer, now: float) -> tuple[Vcpu, ...]:
        """Return the vCPUs that were read; the same tuple as long as nothing changes."""
        key = vm.key
        known = (answer.counters.vcpu_ids, answer.counters.tids, answer.all_vcpu_ids)
        if kept.known == known and not self._should_look_again(kept, answer, now):
            return kept.vcpus
        kept.known, kept.looked_at = known, now
        tids = self._find_threads(key, answer)
        all_ids = sorted(tids)
        indexes = {tid: read_index(self._proc, key.pid, tid) for tid in tids.values() if tid is not None}
        threads = [tids[vcpu_id] for vcpu_id in all_ids]
        numbered = number_vcpus(all_ids, threads, indexes, vm.owner.cpu_topology)
        read = set(answer.counters.vcpu_ids)
        vcpus = tuple(vcpu for vcpu in numbered if vcpu.vcpu_id in read)
        if vcpus != kept.vcpus:
            kept.vcpus = vcpus
        return kept.vcpus

    def _should_look_again(self, kept: _KeptVm, answer: _Answer, now: float) -> bool:
        if answer.knows_threads or now - kept.looked_at < THREADS_SECONDS or not self._thread_lookups_left:
            return False
        if all(vcpu.tid is not None for vcpu in kept.vcpus):
            return False
        self._thread_lookups_left -= 1
        return True

    def _find_threads(self, key: VmKey, answer: _Answer) -> Mapping[int, int | None]:
        """Return the host thread of each of the VM's vCPUs, read or not, None where it is not known."""
        tids: dict[int, int | None] = dict.fromkeys(answer.all_vcpu_ids or ())
        tids |= dict(zip(answer.counters.vcpu_ids, answer.counters.tids, strict=True))
        # debugfs speaks the numbers of the initial pid namespace: elsewhere they would name strangers' threads.
        if answer.knows_threads or None not in tids.values() or not self._host.initial_pid_namespace:
            return tids
        directory = find_vm_directory(self._kvm_debugfs, self._proc, key)
        seen = read_vcpu_tids(directory) if directory is not None else {}
        return {vcpu_id: tid if tid is not None else seen.get(vcpu_id) for vcpu_id, tid in tids.items()}
