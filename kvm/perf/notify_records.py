"""Says which exits are notify exits, to the kernel as a filter, and understands their records. Pure.

The tracepoint is kvm:kvm_exit, arch/x86/kvm/trace.h: ``info1`` is the exit qualification, ``info2`` the IDT-vectoring
information (vmx_get_exit_info in arch/x86/kvm/vmx/vmx.c).
"""

from __future__ import annotations

from typing import NamedTuple

from kvm import abi
from kvm.errors import MalformedData
from kvm.model import NotifyExit
from kvm.perf.ring import Sample
from kvm.perf.tracepoint_format import Tracepoint

FIELDS = ("exit_reason", "isa", "guest_rip", "info1", "info2")
_REASON_MASK = 0xFFFF


def build_mask_filter(field: str, value: int, mask: int) -> str:
    """Return a filter that holds where ``field & mask == value``.

    The kernel's filters cannot say that (Documentation/trace/events.rst, section 5): there ``&`` is only a test for
    bits in common. So each bit of the value is asked for, and none of the others.
    """
    set_bits = [f"{field} & {1 << bit:#x}" for bit in range(mask.bit_length()) if value >> bit & 1]
    return " && ".join([f"!({field} & {mask & ~value:#x})", *set_bits])


# The exit reason is the low half of the field; the CPU sets bits above it, such as 26 for a bus lock and 27 for
# enclave mode (SDM volume 3, "Basic VM-Exit Information"). On SVM the same number is another exit.
NOTIFY_FILTER = f"{build_mask_filter('exit_reason', abi.EXIT_REASON_NOTIFY, _REASON_MASK)} && isa == {abi.KVM_ISA_VMX}"


class TraceRecords(NamedTuple):
    """What has come of an armed thread since the last read.

    ``exits`` are in the order in which they happened. ``lost`` is how many records found the ring full, ``odd`` how
    many could not be understood: both prove nothing. ``other_rip`` is True, from then on, when the thread was seen at
    another RIP than the one last given to ``watch_other_rips``. ``ended`` is True when no more exits will
    come: the allowance is used up (``refresh`` gives more), or ``gone``: the thread has exited.
    """

    exits: tuple[NotifyExit, ...] = ()
    lost: int = 0
    odd: int = 0
    other_rip: bool = False
    ended: bool = False
    gone: bool = False


def decode_notify_exit(tracepoint: Tracepoint, sample: Sample, tid: int) -> NotifyExit | None:
    """Decode a record of kvm:kvm_exit; None where it is too short or tells of another exit.

    A RIP of 0 is one like any other. It is unknown for an exit out of an SGX enclave; of a guest whose registers KVM
    cannot read nobody makes records (exporter/monitor/trace_scheduler.py).
    """
    try:
        reason, isa, rip, qualification, vectoring = tracepoint.decode(sample.raw, FIELDS)
    except MalformedData:
        return None
    if reason & _REASON_MASK != abi.EXIT_REASON_NOTIFY or isa != abi.KVM_ISA_VMX:
        return None
    # Then the record has not the guest's RIP but the enclave's asynchronous exit pointer: the same wherever in the
    # enclave the exit was (SDM volume 3, "Interactions with VMX").
    in_enclave = reason & abi.VMX_EXIT_REASONS_SGX_ENCLAVE_MODE
    return NotifyExit(sample.time_ns, tid, None if in_enclave else rip, qualification, vectoring)
