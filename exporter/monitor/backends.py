"""The interfaces to a host's counters, traces and processes, real or simulated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from exporter.stalls.kernel_evidence import KernelCounts
from exporter.stalls.verdicts import AgentUsage
from kvm.bpf.notify_trigger import NotifyCall, TriggerStatus, VcpuThread
from kvm.model import Instruction, NotifyExit, SnapshotReader, VmKey


class PollMode(StrEnum):
    """What is polled: VMs whose counter can move, or every VM."""

    AUTO = "auto"
    ALWAYS = "always"


class Trigger(Protocol):
    """Reports notify exits as they happen; see kvm.bpf.notify_trigger."""

    @property
    def fd(self) -> int: ...  # noqa: D102
    @property
    def lost(self) -> tuple[int, int]: ...  # noqa: D102
    def open(self) -> TriggerStatus: ...  # noqa: D102
    def deliver(self) -> int: ...  # noqa: D102
    def read_context_invalid(self) -> dict[VcpuThread, int]: ...  # noqa: D102
    def forget(self, ended: Collection[tuple[int, ...]]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


# Reads what a vCPU's thread of a process takes its next notify exit at, waiting for so many seconds; None: none came.
# Raises VmGone and SourceUnavailable.
ReadInstruction = Callable[[int, int, float], Instruction | None]


def is_any_thread(pid: int, tid: int) -> bool:
    """Tell that a thread belongs to its process, where nobody can know."""
    return pid > 0 and tid > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """What the monitor reads with; what is None is not there.

    ``reader`` is read from worker threads, one read at a time. ``read_vcpu`` reads one vCPU of the newest snapshot and
    returns None if it is gone; it raises SourceUnavailable. ``open_pidfd`` opens a pidfd of a VM's process and raises
    VmGone. ``is_thread`` tells whether a thread belongs to a process, ``read_cpu_time`` how many seconds it has run,
    ``may_run_tds`` whether a vCPU whose kind of VM is not known may be a TD's. ``rip_sources`` names the sources of
    those vCPUs of which ``read_vcpu`` has KVM's own word for where notify exits are. ``make_trigger`` makes a trigger
    that hands its calls to the given function. ``read_agent_usage`` reads what the agent itself uses,
    ``read_instruction`` an instruction, None where nobody wants to see any.
    """

    reader: SnapshotReader
    tracer: Tracer | None = None
    read_vcpu: Callable[[VmKey, int], Reading | None] | None = None
    open_pidfd: Callable[[VmKey], int] | None = None
    is_thread: Callable[[int, int], bool] = is_any_thread
    read_cpu_time: Callable[[int, int], float | None] | None = None
    may_run_tds: Callable[[], bool] = bool  # no
    rip_sources: Callable[[], Collection[str]] = tuple  # none
    make_trigger: Callable[[Callable[[NotifyCall], None]], Trigger] | None = None
    read_agent_usage: Callable[[], AgentUsage | None] | None = None
    read_instruction: ReadInstruction | None = None


T = TypeVar("T")


class Records(Protocol):
    """What a trace has given since the last read; ``ended`` when no more comes without a refresh."""

    @property
    def exits(self) -> tuple[NotifyExit, ...]: ...  # noqa: D102
    @property
    def lost(self) -> int: ...  # noqa: D102
    @property
    def odd(self) -> int: ...  # noqa: D102
    @property
    def other_rip(self) -> bool: ...  # noqa: D102
    @property
    def ended(self) -> bool: ...  # noqa: D102
    @property
    def gone(self) -> bool: ...  # noqa: D102


class Armed(Protocol):
    """A thread whose notify exits are traced; ``fd`` is readable when there is something to read."""

    fd: int

    def read(self) -> Records: ...  # noqa: D102
    def watch_other_rips(self, rip: int) -> None: ...  # noqa: D102
    def refresh(self) -> None: ...  # noqa: D102
    def disarm(self) -> None: ...  # noqa: D102


class Tracer(Protocol):
    """Arms threads; all of it waits for the kernel."""

    def open(self) -> None: ...  # noqa: D102
    def arm(self, tid: int) -> Armed: ...  # noqa: D102
    def hold_warm(self) -> None: ...  # noqa: D102
    def release_warm(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Run(Protocol):
    """Runs what waits for the kernel, in a worker thread."""

    def __call__(self, call: Callable[[], T]) -> Awaitable[T]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Reading:
    """One vCPU as it was read in one go: its current registers, none where they cannot be had, and KVM's counters.

    ``untraceable`` is why its exits must not be traced or tell nothing; "" where they may be, None where that is not
    known. ``kernel`` is what a KVM
    with the project's patches says of its notify exits, None where KVM says nothing.
    """

    registers: Mapping[str, int]
    nested: bool | None
    notify_exits: int
    exits: int
    untraceable: str | None = ""
    kernel: KernelCounts | None = None
