"""Reads every vCPU of every VMM in one snapshot, from kernel memory, by BPF: the source ``bpf``.

It needs nothing of a VMM, neither fds nor files nor rights over it, holds nothing of a VM between snapshots, and sees
what nothing else on the host can: whether and with what window a VM's notify exits are armed. lockdown=integrity allows
it.

Ways that were measured, for 10,000 vCPUs in 625 processes with 207,000 open files, while a plain C program needs 27 ms
to dup, pread, close and print as many stats fds that it has found before (in one run, Linux 6.18, 2 CPUs):

- every open file, compared with KVM's f_op (``read_files``): 50 ms, and 8 ms without 300 eventfds a process;
- the tables of fds, walked in chunks by bpf_loop(): 22 ms;
- KVM's own list of VMs (``read_vms``): 5 ms, and 2.5 ms without the eventfds, though it reads no file but the VM's.

So the last is the way here, and the first its fallback: on opening, the list has to lead to a VM of our own before it
is trusted, and that VM has to be read as what it is (``kvm/bpf/fingerprint.py``) before anything is. A few counters of
each vCPU are copied, 8 bytes each; all 1,120 bytes of statistics and the registers are had of single vCPUs by
``read_vcpu``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from kvm.binary_stats import Statistic, find_counters, measure_values
from kvm.bpf.btf import read_types
from kvm.bpf.fingerprint import refuse_layout, refuse_own_vcpu, take_fingerprint
from kvm.bpf.libbpf import LIBRARY, Library, open_library
from kvm.bpf.refusals import check_own_pid, explain
from kvm.bpf.unowned_vms import UnownedVms
from kvm.bpf.vcpu_decode import (
    HostBlocks,
    VmAssembler,
    decode_state,
    find_owner,
    has_gaps,
)
from kvm.bpf.vcpu_programs import (
    ALL,
    DIRECT_OBJECT,
    FILES_ONLY,
    MAX_STATISTICS,
    MAX_WORDS,
    STATISTICS_BYTES,
    WITHOUT_STATE,
    ListChanged,
    RoomNeeded,
    VcpuPrograms,
)
from kvm.discovery.processes import read_stat
from kvm.discovery.vm_discovery import HeldVm
from kvm.errors import MalformedData, SourceUnavailable
from kvm.host.throwaway_vm import ThrowawayVm
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, RIP_STATISTICS, VcpuState, VmCounters, VmKey
from kvm.statistic_plan import NO_STATISTICS, StatPlan, plan_statistics
from kvm.statistics import StatSelection

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_CAPACITY = 16_384
# The list is broken for the microseconds in which a VM comes or goes; each try costs as long.
LIST_TRIES = 50
RETRY_SECONDS = 300.0
FILES_TRIES = 3


class BpfSource:
    """The CounterSource ``bpf``. ``statistics`` names the counters to read of each vCPU, ``selection`` what else.

    ``method`` says how VMs are found once it is open: "list" (KVM's list of VMs), "files" (open files, recognised by
    KVM's f_op) or "names" (by their names, where there is no /dev/kvm); ``method_reason`` why it is not the first.
    ``with_list=False`` forbids the first. ``fast_objects`` are tried before the programs that every kernel takes. One
    read at a time: calls from several threads wait for each other.
    """

    name = "bpf"
    finds_vms = True

    def __init__(
        self,
        statistics: Sequence[str] = (EXITS, NOTIFY_WINDOW_EXITS),
        *,
        selection: StatSelection | None = None,
        library: str = LIBRARY,
        device: Path = Path("/dev/kvm"),
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        capacity: int = FIRST_CAPACITY,
        with_list: bool = True,
        fast_objects: Sequence[Path] = (DIRECT_OBJECT,),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(statistics) > MAX_STATISTICS:
            raise ValueError(f"{len(statistics)} statistics, at most {MAX_STATISTICS} can be read")
        self._wanted = tuple(statistics)
        self._selection = selection
        self._plan = NO_STATISTICS
        self._statistics_reason = ""
        self._library_name = library
        self._device, self._proc, self._sys = device, proc, sys
        self._capacity = capacity
        self._with_list = with_list
        self._fast_objects = tuple(fast_objects)
        self._lock = threading.RLock()
        self._programs: VcpuPrograms | None = None
        self._assembler = VmAssembler(())
        self._described: dict[str, Statistic] = {}
        self._types: bytes | None = None
        self._marks = (-1, -1)
        self._unowned = UnownedVms()
        self._clock = clock
        self._opened_at = 0.0
        self._has_read = False
        self.method = ""
        self.method_reason = ""
        self.tells_rips = False
        """Whether ``read_vcpu`` has KVM's own word for where notify exits are: KVM has the project's patches."""

    @property
    def is_open(self) -> bool:
        """Whether its programs are in the kernel."""
        return self._programs is not None

    @property
    def doubt(self) -> str:
        """Nothing where it has learnt from a VM of our own; by names alone it has to read a VM first."""
        return (
            ""
            if self.method in ("list", "files") or self._has_read
            else "nothing has been read yet: no VM to try it with"
        )

    @property
    def programs(self) -> str:
        """The file name of the programs that are loaded; "" while it is not open."""
        return "" if self._programs is None else self._programs.path.name

    @property
    def limits(self) -> str:
        """What it lacks although it works, and why; "" where nothing."""
        reasons = []
        if self.method_reason:
            reasons.append(f"the slow way, by open files, and without registers: {self.method_reason}")
        if self._selection and (reason := self._find_why_no_statistics()):
            reasons.append(f"without the statistics of --collector.stats: {reason}")
        return "; ".join(reasons)

    def _find_why_no_statistics(self) -> str:
        """Say why the selected statistics are not read; "" where they are."""
        if self.method != "list":
            return "they are read by KVM's list of VMs only"
        return self._statistics_reason

    def open(self) -> None:
        """Load the programs and let them learn what KVM looks like; raises SourceUnavailable."""
        with self._lock:
            self.close()
            self._marks = self._read_marks()
            library = open_library(self._library_name)
            try:
                self._open(library)
            except OSError as err:
                self.close()
                raise explain(err, library.messages.kept(), self._proc, self._sys) from err
            except BaseException:
                self.close()
                raise
            fields = {"method": self.method, "reason": self.method_reason, "programs": self.programs}
            log.info("eBPF source ready", extra={"fields": fields})

    def read(self, vms: Sequence[HeldVm] = (), *, again: bool = False) -> dict[VmKey, VmCounters]:
        """Read every VM of the host, whoever is asked for; raises SourceUnavailable."""
        del vms
        with self._lock:
            programs = self._ready()
            try:
                found = self._read(programs)
                self._has_read = self._has_read or bool(found)
                return found
            except OSError as err:
                raise SourceUnavailable(f"reading by BPF failed: {err}") from err
            except MalformedData as err:
                raise SourceUnavailable(str(err)) from err

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> VcpuState | None:
        """Read registers and all statistics of one vCPU of the newest snapshot, None if it is gone.

        Raises SourceUnavailable where VMs are not found by KVM's list.
        """
        with self._lock:
            programs = self._ready()
            if not self._reads_state(programs):
                raise SourceUnavailable(f"single vCPUs cannot be read here: {self.method_reason}")
            kvm = self._assembler.find_kvm(key)
            state = None if kvm is None else self._read_state(programs, kvm, vcpu_id)
            return state if state is not None and self._is_thread_of(key, state.tid) else None

    def _reads_state(self, programs: VcpuPrograms) -> bool:
        return self.method == "list" and "read_vcpu" in programs.names

    def _read_state(self, programs: VcpuPrograms, kvm: int, vcpu_id: int) -> VcpuState | None:
        length = min(measure_values(self._described.values()), STATISTICS_BYTES)
        try:
            block = self._try_list(lambda: programs.read_vcpu(kvm, vcpu_id, length))
        except (OSError, ListChanged) as err:
            raise SourceUnavailable(f"reading a vCPU by BPF failed: {err}") from err
        return None if block is None else decode_state(block, length, self._described)

    def _is_thread_of(self, key: VmKey, tid: int | None) -> bool:
        """Tell whether a vCPU's thread belongs to the VM's process: memory of a VM that ended is used for others."""
        try:
            started = read_stat(self._proc, key.pid).start_ticks
        except (OSError, MalformedData):
            return False
        return started == key.start_ticks and (self._proc / str(key.pid) / "task" / str(tid)).exists()

    def close(self) -> None:
        """Take everything out of the kernel; may be called twice."""
        with self._lock:
            self.tells_rips = False
            if self._programs is not None:
                self._programs.close()
                self._programs = None

    def _read_marks(self) -> tuple[int, int]:
        """Return what changes when the kvm module is loaded anew, or /dev/kvm comes; raises SourceUnavailable."""
        try:
            module = (self._sys / "module/kvm").stat().st_ino
        except OSError as err:
            raise SourceUnavailable(
                "KVM is not loaded", "modprobe kvm_intel or kvm_amd, if VMs are to run here"
            ) from err
        try:
            return module, self._device.stat().st_rdev
        except OSError:
            return module, -1  # why that is so will be said by what tries to open it

    def _ready(self) -> VcpuPrograms:
        if self._programs is not None and self._read_marks() != self._marks:
            log.warning("KVM has changed: loading the BPF programs again")
            self.open()
        elif self._programs is not None and self._should_try_again():
            self.open()
        return self._loaded()

    def _loaded(self) -> VcpuPrograms:
        if self._programs is None:
            raise SourceUnavailable("it is not open")
        return self._programs

    def _should_try_again(self) -> bool:
        """Tell whether it is time to try for the fast way: what forbade it may have passed."""
        return self._with_list and self.method != "list" and self._clock() - self._opened_at >= RETRY_SECONDS

    def _open(self, library: Library) -> None:
        self._opened_at = self._clock()
        self._types = self._read_types()
        with ExitStack() as stack:
            vm, self.method_reason = self._make_vm(stack)
            self._described = {} if vm is None else vm.statistics
            self._plan = self._plan_statistics(vm)
            programs = self._programs = self._load(library, len(self._wanted))
            learnt = programs.learn() if vm is None else programs.learn(vm.vm_fd, vm.vcpu_fd)
            check_own_pid(programs.control.read("own_tgid"))
            self.method = "files" if learnt else "names"
            if learnt and "list_vms" in programs.names:
                # The list does not stand still while a VM comes or goes.
                if any(programs.learn_vm_list() for _ in range(LIST_TRIES)) and self._sees_own_vm(programs):
                    self.method = "list"
                else:
                    self.method_reason = "KVM's list of VMs does not lead to a VM of our own"
            self._unowned = UnownedVms()
            if vm is not None:
                self._check_layout(vm, learnt)
        self._choose_statistics(self._loaded())
        if reason := self._selection and self._find_why_no_statistics():
            log.warning("without the statistics of --collector.stats", extra={"fields": {"reason": reason}})
        self.tells_rips = self._reads_state(self._loaded()) and self._described.keys() >= set(RIP_STATISTICS)
        if self.method == "names":
            self._try_names(self._loaded())

    def _try_names(self, programs: VcpuPrograms) -> None:
        """Make sure that the VMs that there are can be read; raises SourceUnavailable."""
        try:
            programs.read_files()
        except MalformedData as err:
            raise refuse_layout(str(err)) from err

    def _read_types(self) -> bytes | None:
        try:
            return read_types(self._sys)
        except (OSError, MalformedData) as err:
            # vmlinux's may do; the fingerprint tells.
            log.warning("the kvm module's own types cannot be used", extra={"fields": {"err": str(err)}})
            return None

    def _check_layout(self, vm: ThrowawayVm, learnt: bool) -> None:
        """Make sure that a vCPU of our own is read as what it is; raises SourceUnavailable."""
        if not learnt:
            raise refuse_own_vcpu(["it is not found by its file"])
        fingerprint = take_fingerprint(vm)
        programs = self._loaded()
        address = programs.control.read("wanted_vm")
        programs.control.write_offsets([self._described[fingerprint.counter].offset])
        self._assembler = VmAssembler([fingerprint.counter], self._plan.table)
        if self._selection and self.method == "list":
            programs.read_statistics()
        try:
            found = self._read(programs)
        except MalformedData as err:
            raise SourceUnavailable(str(err)) from err
        key = self._assembler.find_key(address)
        counters = None if key is None else found.get(key)
        differences = list(fingerprint.find_differences(counters))
        programs = self._loaded()  # larger ones, perhaps
        if self._selection and self.method == "list" and counters:
            self._check_statistics(list(fingerprint.find_statistic_differences(counters.statistics)))
        if not differences and self._reads_state(programs):
            state = self._read_state(programs, address, fingerprint.vcpu_id)
            differences = list(fingerprint.find_state_differences(state))
        if differences:
            raise refuse_own_vcpu(differences)

    def _plan_statistics(self, vm: ThrowawayVm | None) -> StatPlan:
        """Choose statistics from what a VM of our own describes."""
        self._statistics_reason = ""
        if self._selection is None or vm is None:
            return NO_STATISTICS
        plan = plan_statistics(self._selection, vm.vm_statistics, vm.statistics, STATISTICS_BYTES)
        if (values := len(plan.vm_words + plan.vcpu_words)) > MAX_WORDS:
            self._statistics_reason = f"{values} values are selected, and at most {MAX_WORDS} can be read"
            return NO_STATISTICS
        return plan

    def _check_statistics(self, differences: Sequence[str]) -> None:
        """Read no statistics where those of a VM of our own are not read as what they are."""
        if differences and self._plan.vm_words + self._plan.vcpu_words:
            self._statistics_reason = str(refuse_own_vcpu(differences))
            self._plan = NO_STATISTICS
            self._loaded().forget_statistics()

    def _make_vm(self, stack: ExitStack) -> tuple[ThrowawayVm | None, str]:
        try:
            return stack.enter_context(ThrowawayVm(self._device)), ""
        except (OSError, MalformedData) as err:
            return None, f"no VM of our own to learn from: {err}"

    def _load(self, library: Library, statistics: int) -> VcpuPrograms:
        """Load as many of the programs as this kernel takes; raises OSError if it does not take the last of them."""
        if self._with_list:
            for path in self._fast_objects:
                with contextlib.suppress(OSError):  # what is lost is speed
                    return VcpuPrograms(
                        library, self._capacity, statistics, ALL, self._types, plan=self._plan, path=path
                    )
        choices = [ALL, WITHOUT_STATE, FILES_ONLY] if self._with_list else [FILES_ONLY]
        for names in choices[:-1]:
            try:
                return VcpuPrograms(library, self._capacity, statistics, names, self._types, plan=self._plan)
            except OSError as err:
                self.method_reason = explain(err, library.messages.kept(), self._proc, self._sys).reason
        return VcpuPrograms(library, self._capacity, statistics, choices[-1], self._types, plan=self._plan)

    def _choose_statistics(self, programs: VcpuPrograms) -> None:
        """Find where the wanted counters stand: by the kernel's own descriptors, else by its types."""
        if self._described:
            offsets = find_counters(self._described, self._wanted)
        else:
            control = programs.control
            typed = {
                EXITS: control.read("exits_offset"),
                NOTIFY_WINDOW_EXITS: control.read("notify_window_exits_offset"),
            }
            offsets = {name: typed[name] for name in self._wanted if typed.get(name)}
        if not offsets:
            raise SourceUnavailable(f"this kernel counts none of {', '.join(self._wanted)}")
        programs.control.write_offsets(tuple(offsets.values()))
        self._assembler = VmAssembler(offsets, self._plan.table if self._selection else None)

    def _sees_own_vm(self, programs: VcpuPrograms) -> bool:
        try:
            blocks = self._try_list(programs.read_vms)
        except ListChanged:
            return False
        except RoomNeeded:
            return True  # every step of the list was checked, and it led back to its head
        return find_owner(blocks.vms, programs.control.read("wanted_vm")) == os.getpid()

    def _try_list(self, read: Callable[[], T]) -> T:
        """Call ``read`` until KVM's list stood still; raises ListChanged if it never does."""
        for _ in range(LIST_TRIES - 1):
            with contextlib.suppress(ListChanged):
                return read()
        return read()

    def _read(self, programs: VcpuPrograms) -> dict[VmKey, VmCounters]:
        if self.method != "list":
            return self._assembler.assemble(self._read_files(programs))
        try:
            blocks = self._try_list(programs.read_vms)
        except ListChanged:
            return self._assembler.assemble(self._read_files(programs))
        except RoomNeeded as needed:
            return self._read(self._grow(programs, needed.vcpus))
        began = self._clock()
        if asked := self._unowned.choose(blocks.vms, began):
            self._unowned.take(asked, self._read_files(programs), began, self._clock())
        return self._assembler.assemble(self._unowned.join(blocks))

    def _read_files(self, programs: VcpuPrograms) -> HostBlocks:
        """Read by open files; again if a process was closing its files meanwhile."""
        for _ in range(FILES_TRIES - 1):
            blocks = programs.read_files()
            if not has_gaps(blocks.vms):
                return blocks
        return programs.read_files()

    def _grow(self, programs: VcpuPrograms, vcpus: int) -> VcpuPrograms:
        """Load the programs again with more room, and let them take over what these have learnt."""
        self._capacity = 1 << (vcpus + vcpus // 4).bit_length()
        larger = VcpuPrograms(
            programs.library,
            self._capacity,
            len(self._wanted),
            programs.names,
            self._types,
            plan=self._plan,
            path=programs.path,
        )
        larger.control.take_over(programs.control)
        programs.close()
        self._programs = larger
        return larger
