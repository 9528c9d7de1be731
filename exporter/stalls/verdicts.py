"""The words for what is found out about vCPUs: states, verdicts, and the report of the whole stall monitor.

Plain values: what the detector finds crosses in them to the metrics, the log and the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from kvm.model import Instruction, Vcpu, VcpuKey, Vm, VmKey


class State(StrEnum):
    """What is known of a vCPU's forward progress."""

    QUIET = "quiet"
    NOTIFYING = "notifying"
    PROGRESSING = "progressing"
    SUSPECT = "suspect"
    STALLED = "stalled"
    RECOVERED = "recovered"
    CONTEXT_LOST = "context_lost"
    UNKNOWN = "unknown"


class Evidence(StrEnum):
    """What tells at which RIP notify exits were: KVM itself, where it has the patches (kvm/patches), or a trace."""

    KERNEL = "kernel"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class StallRule:
    """How long and for how many exits a vCPU must have been suspect to be called stalled."""

    exits: int = 10
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one vCPU, at the moment the state began or was asked for.

    ``reason`` is the evidence in words. ``rip``, ``streak`` (records in a row at it), ``exits`` (of the counter, all at
    it), ``stuck_since_seconds``, ``registers_alike`` (None: could not be read) and the rest are about the RIP that the
    vCPU is or, if recovered, was suspected at. ``episode`` numbers the stalls of this vCPU: one that is stalled, then
    unknown, then stalled again has not had a second one. ``nested`` is None where it is not known.
    ``cpu_percent`` is how much of a CPU the thread used in the last second or so, None where that was not measured.
    ``nested_unjudged`` says that the vCPU makes progress and its nested guest may be stuck all the same.
    ``evidence`` is what told the RIPs, None where nothing has yet.
    """

    state: State
    since_seconds: float
    reason: str = ""
    rip: int | None = None
    streak: int = 0
    exits: int = 0
    stuck_since_seconds: float | None = None
    registers_alike: bool | None = None
    nested: bool | None = None
    context_invalid: bool = False
    idt_vectoring: int = 0
    episode: int = 0
    cpu_percent: float | None = None
    nested_unjudged: bool = False
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class VcpuReport:
    """A verdict with whom it is about.

    ``source`` is where the VM's counters come from, ``notify_exits`` the counter as it was last read, ``moved_seconds``
    when a notify exit was last known to happen (CLOCK_MONOTONIC). ``traced_exits`` and ``same_rip_exits`` count notify
    exits whose RIP was seen since the agent runs. ``can_judge`` is False where nothing can be said: RIPs are
    hidden, or the thread is not known.
    ``deferred_reason`` says why a vCPU that has moved is not traced now, "" where it is or need not be.
    ``drill`` marks a verdict that an operator has asked for to test the alarm. ``instruction`` is what KVM has read at
    the verdict's RIP, None where nobody asked.
    """

    vm: Vm
    vcpu: Vcpu
    verdict: Verdict
    source: str = ""
    notify_exits: int | None = None
    moved_seconds: float | None = None
    traced_exits: int = 0
    same_rip_exits: int = 0
    can_judge: bool = True
    deferred_reason: str = ""
    drill: bool = False
    instruction: Instruction | None = None


class VcpuFigures(NamedTuple):
    """What metrics tell of a vCPU that has taken a notify exit: the few words of a VcpuReport that change seldom.

    ``stuck_since_seconds`` is None unless it is stalled.
    """

    state: State
    stuck_since_seconds: float | None
    traced_exits: int
    same_rip_exits: int
    can_judge: bool


def find_stuck(state: State, can_judge: bool) -> int | None:
    """Tell whether a vCPU is stuck, as its metric does: 1 or 0, None where that is not known."""
    if state is State.STALLED:
        return 1
    return 0 if can_judge and state not in (State.UNKNOWN, State.CONTEXT_LOST) else None


class VmFigures(NamedTuple):
    """What metrics tell of a VM's vCPUs that have taken a notify exit: VcpuFigures in columns, sorted by vcpu_id.

    ``stuck`` tells of each whether it is (``find_stuck``), and ``stalled`` how many are. The whole is the same object
    until something changes.
    """

    vcpu_ids: tuple[int, ...] = ()
    states: tuple[State, ...] = ()
    stuck_since_seconds: tuple[float | None, ...] = ()
    traced_exits: tuple[int, ...] = ()
    same_rip_exits: tuple[int, ...] = ()
    can_judge: tuple[bool, ...] = ()
    stuck: tuple[int | None, ...] = ()
    stalled: int = 0

    @property
    def vcpus(self) -> dict[int, VcpuFigures]:
        """The figures of each vCPU, by vcpu_id."""
        rows = map(VcpuFigures._make, zip(*self[1:-2], strict=True))
        return dict(zip(self.vcpu_ids, rows, strict=True))


# Kinds of the agent's threads: the event loop, and its pools of workers.
THREAD_KINDS: Final = ("main", "monitor", "scrape", "status", "other")


@dataclass(frozen=True, slots=True)
class AgentUsage:
    """What the agent itself uses: threads now, and CPU seconds by kind of thread and context switches since start.

    A kind's CPU seconds are those of threads that still run: the pools keep theirs for the agent's life.
    """

    threads: int
    cpu_seconds: Mapping[str, float]
    voluntary_switches: int
    involuntary_switches: int


@dataclass(frozen=True, slots=True)
class MonitorReport:
    """What the stall monitor has found, and how it works.

    ``vcpus`` are those that have taken a notify exit in the agent's time, unless only ``figures`` of these were asked
    for, and always those of drills; every other one is quiet. ``problem`` says why RIPs cannot be had ("" where they
    can), ``evidence`` what tells them on this host. ``trigger`` is what tells of notify exits: "bpf", "poll", or ""
    where none can happen; ``trigger_problem`` is why no BPF trigger is attached ("" where one is, or where none is
    wanted), ``trigger_missed`` how often a counter had moved of which the trigger told nothing, and ``missed_vcpus``
    whose.
    ``interval_min_seconds`` is by the VM's window in cycles, ``context_invalid`` by pid, start_ticks,
    tid and vcpu_id, None where nothing counts it; ``agent_usage`` is None until it has been read.
    """

    vcpus: tuple[VcpuReport, ...] = ()
    figures: Mapping[VmKey, VmFigures] = field(default_factory=dict)
    problem: str = ""
    evidence: Evidence = Evidence.TRACE
    trigger: str = ""
    trigger_problem: str = ""
    trigger_missed: int = 0
    missed_vcpus: frozenset[VcpuKey] = frozenset()
    poll_period_seconds: float = 0.0
    traced_vcpus: int = 0
    armings: int = 0
    records: int = 0
    lost_records: int = 0
    budget_exhausted: int = 0
    warnings: int = 0
    warnings_suppressed: int = 0
    interval_min_seconds: Mapping[int, float] = field(default_factory=dict)
    context_invalid: Mapping[tuple[int, int, int, int], int] | None = None
    agent_usage: AgentUsage | None = None


# Intel SDM volume 3, table 6-1
VECTORS: Final[Mapping[int, str]] = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE", 21: "#CP",
}  # fmt: skip


_VECTORING_VALID: Final = 1 << 31


def name_vector(idt_vectoring: int) -> str:
    """Name the event whose delivery the exit has interrupted, "" for none (SDM volume 3, IDT-vectoring information)."""
    if not idt_vectoring & _VECTORING_VALID:
        return ""
    vector = idt_vectoring & 0xFF
    return f"vector {vector} ({VECTORS[vector]})" if vector in VECTORS else f"vector {vector}"


def render_rip(rip: int | None) -> str:
    """Render a RIP as kernels do."""
    return "unknown" if rip is None else f"{rip:#x}"
