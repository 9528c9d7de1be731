"""Reads the instruction at which a vCPU takes notify exits: one record of kvm:kvm_notify_window (``kvm/patches``).

KVM itself reads the bytes, in the handler of the exit and as the guest would fetch them. From outside, on a kernel
without the patches, that cannot be done honestly, and so it is not done. To find the bytes takes CR3, CR0, CR4 and the
base of CS. All of them are in VMX_REGS_LAZY_LOAD_SET (arch/x86/kvm/vmx/vmx.h): what KVM has of them in memory is void
from each VM entry until somebody asks the VMCS again. With EPT a guest changes CR3 without an exit, and neither a
notify exit nor the tracepoint kvm:kvm_exit asks for anything of it but RIP. So of a vCPU that is stuck, of all, they
are never known, and an answer would be a guess by another process's page tables.

The event costs the vCPU's notify exits a read of guest memory while it is open, and other exits nothing. It is closed
after its record, which waits for a grace period.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kvm.discovery.processes import is_thread_of
from kvm.errors import MalformedData, SourceUnavailable, VmGone
from kvm.host.private_mount import PrivateMount
from kvm.host.privileges import read_privileges
from kvm.model import Instruction
from kvm.perf import event as perf_event
from kvm.perf.notify_tracer import TRACEFS
from kvm.perf.refusals import explain
from kvm.perf.tracefs import open_tracefs, read_tracepoint
from kvm.perf.tracepoint_format import Tracepoint

SYSTEM, NAME = "kvm", "kvm_notify_window"
FIELDS = ("rip", "streak", "guest_mode", "insn_len")
CODE = "insn"


def decode_instruction(tracepoint: Tracepoint, record: bytes) -> Instruction | None:
    """Decode a record; None where KVM did not know RIP. Raises MalformedData where it is too short or makes no sense.

    Without bytes KVM could not read them: the page is not mapped, or not there.
    """
    rip, streak, guest_mode, length = tracepoint.decode(record, FIELDS)
    offset, size, _signed = tracepoint.fields[CODE]
    code = record[offset : offset + size]
    if len(code) != size or length > size:
        raise MalformedData(tracepoint.name, f"{length} bytes of an instruction, in a record of {len(record)}")
    return Instruction(rip, bool(guest_mode), streak, code[:length]) if streak else None


class InstructionReader:
    """Reads instructions, one at a time; it holds nothing in between."""

    def __init__(
        self,
        tracefs: Path = TRACEFS,
        *,
        proc: Path = Path("/proc"),
        sysfs: Path = Path("/sys"),
        open_private: Callable[[str], PrivateMount] = PrivateMount,
    ) -> None:
        self._preferred, self._proc, self._sysfs, self._open_private = tracefs, proc, sysfs, open_private

    def read(self, pid: int, tid: int, wait_seconds: float) -> Instruction | None:
        """Wait for the next notify exit of a thread of a process; None where none came, or its RIP is not known.

        Waits for the kernel, too. Raises VmGone where the thread has ended, SourceUnavailable where it cannot be done.
        """
        with ExitStack() as stack:
            tracefs = open_tracefs(self._preferred, self._proc, self._sysfs, self._open_private)
            stack.callback(tracefs.close)
            tracepoint = self._read_tracepoint(tracefs.path)
            try:
                fd = perf_event.open_event(tracepoint.id, tid)
                stack.callback(os.close, fd)
                if not is_thread_of(pid, tid, self._proc):
                    raise VmGone(f"thread {tid} is no thread of the VM any more")
                ring = perf_event.Ring(fd, perf_event.count_pages(tracepoint.size, 2))
                stack.callback(ring.close)
                perf_event.allow_records(fd, 1)
            except OSError as err:
                raise explain(err, tid, read_privileges(self._proc, self._sysfs, self._open_private)) from err
            waiter = select.poll()
            waiter.register(fd, select.POLLIN)
            waiter.poll(round(1000 * wait_seconds))
            samples = ring.read().samples
        try:
            return decode_instruction(tracepoint, samples[0].raw) if samples else None
        except MalformedData as err:
            raise SourceUnavailable(str(err), "please report this with the kernel's version") from err

    def _read_tracepoint(self, tracefs: Path) -> Tracepoint:
        # Read each time: when the module kvm is loaded anew, its tracepoints get other numbers.
        try:
            tracepoint = read_tracepoint(tracefs, SYSTEM, NAME)
        except FileNotFoundError as err:
            reason = f"KVM has no tracepoint {SYSTEM}:{NAME}"
            raise SourceUnavailable(reason, "use a KVM with the patches of kvm/patches") from err
        missing = [*tracepoint.find_missing(FIELDS), *({CODE} - tracepoint.fields.keys())]
        if missing:
            raise SourceUnavailable(f"{SYSTEM}:{NAME} has no {', '.join(missing)}", "use the patches of kvm/patches")
        return tracepoint
