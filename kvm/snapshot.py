"""Takes one snapshot of the whole host: asks the sources in order, and says how each went.

The best source that works has the first word on every VM; the next one is asked only for what is left. A source that
does not work is tried again now and then, not at every snapshot: under lockdown each try writes to the kernel log. Each
source is tried at the first snapshot, so that what works is known of all, and the next one is ready when needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvm.blind_spots import REFUSED_PROCESSES, BlindSpotLog, Evidence, find_blind_spots
from kvm.counters.debugfs import may_hold_vms
from kvm.counters.retried_source import RETRY_SECONDS, RetriedSource
from kvm.counters.source import CounterSource
from kvm.discovery.vm_discovery import Discovery
from kvm.errors import SourceUnavailable
from kvm.host import facts
from kvm.identity.vm_ids import OWNER_WAIT_SECONDS, FindOwners, VmIds
from kvm.model import Host, Snapshot, VmCounters, VmKey
from kvm.read_errors import ReadErrors
from kvm.readings import Answer, Answers, Readings
from kvm.vm_budget import VmBudget

log = logging.getLogger(__name__)


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
        self._readings = Readings(proc, kvm_debugfs)
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
        vms = self._identities.identify(answers.find_tids())
        readings = self._readings.make(answers, vms, self._host, now)
        for key in vms if not answers.source else ():
            if not answers.each[key].source:
                self._errors.record("none", key, "unread", answers.each[key].counters.problem)
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
            composition=self._readings.composition,
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

    def _read_counters(self, now: float) -> Answers:
        """Ask the sources in order, each only for the VMs that no better one has read."""
        answers: dict[VmKey, Answer] | None = None
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
                return Answers(name, found)
            answers = answers if answers is not None else self._find_unread()
            try:
                self._ask(kept.source, answers)
            except SourceUnavailable as err:
                kept.fail(err)
        return Answers(each=answers if answers is not None else self._find_unread())

    def _find_unread(self) -> dict[VmKey, Answer]:
        unread = VmCounters(problem="no source works")
        # Before they are read: what is over budget is to cost nothing more.
        self._held = self._budget.keep({vm.key: vm for vm in self._discovery.find_vms()})
        self._over_budget = self._budget.over + self._discovery.vms_left_out
        return {key: Answer("", unread, vm.vcpu_ids, vm.tid, False) for key, vm in self._held.items()}

    def _ask(self, source: CounterSource, answers: dict[VmKey, Answer]) -> None:
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
