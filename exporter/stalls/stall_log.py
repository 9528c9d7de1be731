"""Tells people of stalls: one line a stall and one when it ends, as many as a person can read.

A guest can stall and recover as often as it likes, so lines have a budget: HOST_LINES in any minute for the host, one
for each VM. What is withheld is counted, and a summary tells of it at most once a minute. A stall that is withheld and
lasts is told of as soon as the budget allows, unless its VM has one already that people know of. Who has waited longer
comes first, but VMs that have not been told of come before those that have: nobody can hide a stall for good by making
others.

Only what was told of is told to be over. Drills are outside the budget: there is one at a time, and a drill must not
cost the line of a real stall.
"""

from __future__ import annotations

import logging
from collections import deque
from datetime import UTC, datetime
from typing import Final

from exporter.stalls.disassembly import disassemble
from exporter.stalls.verdicts import Evidence, State, VcpuReport, name_vector, render_rip
from kvm.model import Instruction, VmKey

log = logging.getLogger(__name__)

WINDOW_SECONDS: Final = 60.0
HOST_LINES: Final = 5

# For `journalctl MESSAGE_ID=...`: which kind of message it is, in whatever words.
STALL_ID: Final = "5d0c1f6ad8f84bd79a2ee0c5d5a7c3b1"
RECOVERY_ID: Final = "2f6b9b3f3f5e4f0d8d0b2f4b7a4e1c92"
CONTEXT_LOST_ID: Final = "6c1d3b0e6a2c4f0e9a7f53c1f0d4b8e2"
WITHHELD_ID: Final = "9f0f2f8e0d6c4a55b6f1d3f0b8a9e7d4"

MEANING: Final = (
    "The guest is stuck at one instruction: it opens no event window there and executes nothing further. "
    "The host is safe, the exit gives the CPU back each time."
)
MEANING_INVALID: Final = (
    "The guest is stuck, and the CPU says that its state is lost (context invalid): this vCPU cannot go on."
)
MEANING_DELIVERY: Final = (
    "The guest is stuck while the CPU delivers an event to it: a loop in microcode, of the kind of CVE-2015-5307."
)
ACTION: Final = (
    "Ask the owner what runs there (the RIP and the guest's symbols name the code); pause or reset the VM if its CPU "
    "time is needed. Several owners at once: compare CPU and microcode (kvm_host_info). "
    "Details: /api/v1/vcpus of this agent."
)
ACTION_INVALID: Final = "Tell the owner and reset the VM: its VMM has stopped it, or will."
MEANING_LOST: Final = (
    "The CPU says that it has lost the state of this vCPU (context invalid): the vCPU cannot go on. That is the fault "
    "of the processor or its microcode, not of the guest."
)
ACTION_LOST: Final = (
    "Tell the owner and reset the VM: its VMM has stopped it, or will. Compare CPU and microcode of the hosts where "
    "this happens (kvm_host_info)."
)


_Key = tuple[VmKey, int]


class StallLog:
    """Writes the lines; ``warnings`` and ``suppressed`` count them. Times are CLOCK_MONOTONIC and Unix seconds."""

    def __init__(self) -> None:
        self.warnings = 0
        self.suppressed = 0
        self._told: dict[_Key, VcpuReport] = {}
        self._waiting: dict[_Key, VcpuReport] = {}
        self._host_lines: deque[float] = deque()
        self._vm_lines: dict[VmKey, float] = {}
        self._withheld: list[VmKey] = []
        self._summed_up_at = float("-inf")
        # Of lost contexts: lines of their own, so that stalls cannot withhold them.
        self._lost_lines: deque[float] = deque()
        self._lost_vms: dict[VmKey, float] = {}

    @property
    def busy(self) -> bool:
        """Whether there is something that ``flush`` may still have to write."""
        return bool(self._waiting or self._withheld)

    def concerns(self, key: _Key, state: State) -> bool:
        """Tell whether there may be something to say of a vCPU that has entered a state: mostly there is not."""
        return state in (State.STALLED, State.CONTEXT_LOST) or key in self._told or key in self._waiting

    def tell(self, report: VcpuReport, now: float, unix: float) -> None:
        """Tell of a vCPU that has entered the state of its verdict, where that is worth a line."""
        key = (report.vm.key, report.vcpu.vcpu_id)
        if report.drill:
            self._tell_drill(report, now, unix)
        elif report.verdict.state is State.CONTEXT_LOST:
            self._waiting.pop(key, None)
            self._tell_context_lost(report, now)  # if that is withheld, people know of the stall before it
        elif report.verdict.state is State.STALLED and key not in self._told and key not in self._waiting:
            self._waiting[key] = report
            self._tell_waiting(now, unix, newest=key)
            if key in self._waiting:
                self.suppressed += 1
                self._withheld.append(report.vm.key)
        elif report.verdict.state is State.NOTIFYING:
            told = self._told.get(key)
            if told is not None and told.verdict.state is State.CONTEXT_LOST:
                del self._told[key]
                _write_end(report, now, "vCPU runs again", report.verdict.reason)
        elif report.verdict.state in (State.RECOVERED, State.PROGRESSING):
            self._waiting.pop(key, None)
            if self._told.pop(key, None):
                _write_end(report, now, "vCPU makes progress again", report.verdict.reason)

    def tell_end(self, key: VmKey, now: float) -> None:
        """Tell that a VM has ended, where people know of a stall of it."""
        for vm, vcpu_id in [found for found in (*self._waiting, *self._told) if found[0] == key]:
            self.tell_unplugged(vm, vcpu_id, now, "vCPU is gone: its VM has ended")
        self._vm_lines.pop(key, None)
        self._lost_vms.pop(key, None)

    def tell_unplugged(self, vm: VmKey, vcpu_id: int, now: float, what: str = "vCPU is gone") -> None:
        """Tell that a VM has one vCPU less, where people know of a stall of it."""
        self._waiting.pop((vm, vcpu_id), None)
        if told := self._told.pop((vm, vcpu_id), None):
            _write_end(told, now, what, "")

    def flush(self, now: float, unix: float) -> None:
        """Write what the budget has withheld and now allows; to be called every second or so."""
        self._tell_waiting(now, unix)
        if self._withheld and now - self._summed_up_at >= WINDOW_SECONDS:
            self._summed_up_at = now
            fields = {"withheld": len(self._withheld), "vms": len(set(self._withheld)), "unsaid": len(self._waiting)}
            text = "stall warnings withheld, so that one guest cannot fill the log"
            log.warning(text, extra={"fields": fields, "message_id": WITHHELD_ID})
            self._withheld.clear()

    def _tell_waiting(self, now: float, unix: float, newest: _Key | None = None) -> None:
        """Tell of what may be told now; ``newest`` also if its VM has a stall that people know of."""
        while self._host_lines and now - self._host_lines[0] >= WINDOW_SECONDS:
            self._host_lines.popleft()
        known = {vm for vm, _ in self._told}
        for key in sorted(self._waiting, key=lambda key: self._find_last_line(key[0])):
            if len(self._host_lines) >= HOST_LINES:
                return
            is_news = key[0] not in known or key == newest
            if is_news and now - self._find_last_line(key[0]) >= WINDOW_SECONDS:
                self._tell_stall(key, self._waiting.pop(key), now, unix)

    def _find_last_line(self, vm: VmKey) -> float:
        return self._vm_lines.get(vm, float("-inf"))

    def _tell_stall(self, key: _Key, report: VcpuReport, now: float, unix: float) -> None:
        self.warnings += 1
        self._told[key] = report
        self._host_lines.append(now)
        self._vm_lines[key[0]] = now
        _write_stall(report, now, unix)

    def _tell_context_lost(self, report: VcpuReport, now: float) -> None:
        while self._lost_lines and now - self._lost_lines[0] >= WINDOW_SECONDS:
            self._lost_lines.popleft()
        key = report.vm.key
        if len(self._lost_lines) >= HOST_LINES or now - self._lost_vms.get(key, float("-inf")) < WINDOW_SECONDS:
            self.suppressed += 1
            self._withheld.append(key)
            return
        self.warnings += 1
        self._lost_lines.append(now)
        self._lost_vms[key] = now
        self._told[key, report.vcpu.vcpu_id] = report
        fields = _name(report) | {"context": "invalid", "meaning": MEANING_LOST, "action": ACTION_LOST}
        text = f"{_mark(report)}the CPU has lost the state of a vCPU"
        log.warning(text, extra={"fields": fields, "message_id": CONTEXT_LOST_ID})

    def _tell_drill(self, report: VcpuReport, now: float, unix: float) -> None:
        if report.verdict.state is State.STALLED:
            self.warnings += 1
            _write_stall(report, now, unix)
        elif report.verdict.state is State.RECOVERED:
            _write_end(report, now, "vCPU makes progress again", report.verdict.reason)


def _write_stall(report: VcpuReport, now: float, unix: float) -> None:
    message = f"{_mark(report)}vCPU makes no forward progress"
    fields = build_stall_fields(report, now, unix)
    log.warning(message, extra={"fields": fields, "message_id": STALL_ID})


def _write_end(report: VcpuReport, now: float, what: str, reason: str) -> None:
    verdict = report.verdict
    since = verdict.stuck_since_seconds
    fields = _name(report) | {"rip": render_rip(verdict.rip)}
    if since is not None:
        fields["stalled_seconds"] = round(now - since, 1)
    if reason:
        fields["reason"] = reason
    log.info(f"{_mark(report)}{what}", extra={"fields": fields, "message_id": RECOVERY_ID})


def build_stall_fields(report: VcpuReport, now: float, unix: float) -> dict[str, object]:
    """Return what a person on call needs: who, where, what, what it means, what to do."""
    verdict = report.verdict
    since = now if verdict.stuck_since_seconds is None else verdict.stuck_since_seconds
    fields = _name(report) | {
        "rip": render_rip(verdict.rip),
        "exits_at_rip": verdict.exits,
        "since": f"{datetime.fromtimestamp(unix - (now - since), UTC):%Y-%m-%dT%H:%M:%S}Z",
        "seconds": round(now - since, 1),
        "context": "invalid" if verdict.context_invalid else "valid",
        "nested": {None: "unknown", False: "no", True: "yes"}[verdict.nested],
        "registers": {None: "not-read", False: "read-once", True: "unchanged"}[verdict.registers_alike],
        "evidence": verdict.evidence or "none",
    }
    fields |= _describe_instruction(report.instruction)
    if verdict.cpu_percent is not None:
        fields["cpu_percent_of_thread"] = round(verdict.cpu_percent)
    if delivering := name_vector(verdict.idt_vectoring):
        fields["delivering"] = delivering
    return fields | {"meaning": _explain(report), "action": _advise(report)}


def _describe_instruction(instruction: Instruction | None) -> dict[str, object]:
    if instruction is None:
        return {}
    fields: dict[str, object] = {"instruction": instruction.code.hex(" ") or "unreadable"}
    if text := disassemble(instruction.code, instruction.rip):
        fields["instruction_as_64_bit"] = text
    return fields


def _name(report: VcpuReport) -> dict[str, object]:
    owner = report.vm.owner
    fields: dict[str, object] = {"vm": report.vm.id, "name": owner.name}
    if owner.display_name:
        fields["display_name"] = owner.display_name
    fields["owner"] = owner.project or owner.namespace
    if report.drill:
        fields["drill"] = "yes"
    return fields | {
        "vmm": owner.vmm,
        "pid": report.vm.key.pid,
        "vcpu": report.vcpu.index,
        "tid": "unknown" if report.vcpu.tid is None else report.vcpu.tid,
        "source": report.source,
    }


def _mark(report: VcpuReport) -> str:
    """Return what a line begins with that is not about a guest of this host."""
    if report.drill:
        return "DRILL, not real: "
    return "SIMULATED, not real: " if report.source == "simulated" else ""


def _explain(report: VcpuReport) -> str:
    verdict = report.verdict
    if report.drill:
        return "Somebody tests the alarm; the guest is well."
    text = MEANING
    if verdict.context_invalid:
        text = MEANING_INVALID
    elif name_vector(verdict.idt_vectoring):
        text = MEANING_DELIVERY
    if verdict.nested and verdict.evidence is Evidence.KERNEL:
        text += " The RIP is that of its nested guest."
    elif verdict.nested:
        text += " It runs a nested guest, to which the RIP may belong."
    if verdict.registers_alike is None:
        text += " Its registers could not be read: a long REP instruction would show the same."
    return text


def _advise(report: VcpuReport) -> str:
    if report.drill:
        return "Nothing, if this has reached you as a real one would; it ends by itself."
    return ACTION_INVALID if report.verdict.context_invalid else ACTION
