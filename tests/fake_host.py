"""A host whose guests do what a test says: counters, registers, traces and a trigger, without a kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from exporter.monitor.backends import Reading
from exporter.stalls.kernel_evidence import KernelCounts
from kvm.bpf.notify_trigger import AGAIN_SECONDS, NotifyCall, TriggerStatus, VcpuThread
from kvm.errors import SourceUnavailable, VmGone
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Host,
    NotifyExit,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vcpu,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from tests.snapshots import INTEL

R = 0xFFFFFFFF81000000
ALLOWANCE = 64


@dataclass
class Exit:
    seconds: float
    rip: int | None
    is_notify: bool


# What a vCPU does at a time, by its behaviour: RIPs, and whether the exit is a notify exit. Others run.
ACTS: dict[str, list[tuple[int | None, bool]]] = {
    "stuck": [(R, True), (R, False)],
    "stuck, uninterrupted": [(R, True)],
    "stuck at 0": [(0, True), (0, False)],
    "alternating": [(R, True), (R + 16, True)],
    "others": [(R, True), (R + 2, False)],
    "notified now and then": [(R + 4 * number, number % 100 == 0) for number in range(200)],
    "rep": [(R, True)],
    "enclave": [(None, True)],
    "stuck, with a timer": [(R, True), (R, False)],
}
# Whose other exits are interrupts of the host.
INTERRUPTED = frozenset({"stuck", "stuck at 0"})


@dataclass
class FakeStatistics:
    """What a KVM with the project's patches counts: kvm_account_notify_exit() of kvm/patches in Python."""

    exits: int = 0
    notify_exits: int = 0
    irq_exits: int = 0
    same_rip_exits: int = 0
    stuck_exits: int = 0
    last_rip: int = 0
    last_guest_mode: bool = False
    streak: int = 0
    last_registers: int = 0
    last_exits: int = 0

    def account(self, rip: int | None, is_notify: bool, is_interrupt: bool, registers: int) -> None:
        self.exits += 1
        self.irq_exits += is_interrupt
        if not is_notify:
            return
        self.notify_exits += 1
        if rip is None:
            self.streak = self.last_rip = 0
            return
        if self.streak and self.last_rip == rip:
            self.same_rip_exits += 1
            self.stuck_exits += self.last_registers == registers and self.last_exits + 1 == self.exits
        else:
            self.streak = 0
        self.last_rip, self.last_registers, self.last_exits = rip, registers, self.exits
        self.streak += 1

    def read(self) -> KernelCounts:
        repeats = (self.same_rip_exits, self.stuck_exits)
        return KernelCounts(
            *repeats, 0, self.last_rip, self.last_guest_mode, self.streak, self.notify_exits, self.exits, self.irq_exits
        )


@dataclass
class FakeVcpu:
    """``behaviour`` is what it does: idle, running, or one of ACTS."""

    tid: int
    interval: float = 0.01
    behaviour: str = "idle"
    notify_exits: int = 0
    exits: int = 0
    rcx: int = 10**6
    until: float = 1000.0
    untraceable: str | None = ""
    untold: bool = False
    armed: list[FakeArmed] = field(default_factory=list)
    cpu_seconds: float = 0.0
    statistics: FakeStatistics = field(default_factory=FakeStatistics)

    def live(self, now: float, on_notify: Callable[[FakeVcpu, float], None]) -> None:
        """Do what is to be done until now."""
        while self.behaviour != "idle" and self.until + self.interval <= now:
            self.until += self.interval
            self.cpu_seconds += self.interval
            for number, (rip, is_notify) in enumerate(self.act()):
                self.exits += 1
                self.notify_exits += is_notify
                is_interrupt = not is_notify and self.behaviour in INTERRUPTED
                self.statistics.account(rip, is_notify, is_interrupt, self.rcx)
                if is_notify:
                    on_notify(self, self.until)
                for armed in self.armed:
                    armed.take(Exit(self.until + number * 1e-6, rip, is_notify))
        if self.behaviour == "idle":
            self.until = now

    def act(self) -> list[tuple[int | None, bool]]:
        if self.behaviour in ("rep", "working"):
            self.rcx -= 1
        return ACTS.get(self.behaviour, [(R + 64, False)])


class FakeArmed:
    def __init__(self, host: FakeHost, vcpu: FakeVcpu) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._host, self._vcpu = host, vcpu
        self._exits: list[NotifyExit] = []
        self._left = ALLOWANCE
        self._rip: int | None = None
        self._other = False
        self.lost = 0
        host.settle()
        vcpu.armed.append(self)
        host.armed_at[vcpu.tid] = host.clock()
        host.most_armed = max(host.most_armed, sum(len(v.armed) for v in host.vcpus()))

    def take(self, made: Exit) -> None:
        if self._rip is not None and made.rip != self._rip:
            self._other = True
            os.eventfd_write(self.fd, 1)
        if made.is_notify and self._left:
            self._left -= 1
            os.eventfd_write(self.fd, 1)
            if self._host.loses:
                self.lost += 1
            else:
                self._exits.append(NotifyExit(round(made.seconds * 1e9), self._vcpu.tid, made.rip, 0, 0))

    def read(self) -> FakeRecords:
        self._host.settle()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        exits, self._exits = tuple(self._exits), []
        lost, self.lost = self.lost, 0
        gone = self._vcpu.tid in self._host.dead_threads
        ended = gone or not self._left
        if self._host.garbles:
            return FakeRecords((), lost, self._other, gone, ended, odd=len(exits))
        return FakeRecords(exits, lost, self._other, gone, ended)

    def watch_other_rips(self, rip: int) -> None:
        self._host.settle()
        self._rip, self._other = rip, False

    def refresh(self) -> None:
        if not self._left:
            self._left = ALLOWANCE

    def disarm(self) -> None:
        if self.fd >= 0:
            self._host.settle()
            os.close(self.fd)
            self.fd = -1
            self._vcpu.armed.remove(self)
            began = self._host.armed_at[self._vcpu.tid]
            self._host.armed_times.append((self._vcpu.tid, began, self._host.clock()))


@dataclass(frozen=True)
class FakeRecords:
    exits: tuple[NotifyExit, ...]
    lost: int
    other_rip: bool
    gone: bool
    ended: bool
    odd: int = 0


class FakeVm:
    """One VM; a process has more than one by other values of ``vm_fd``."""

    def __init__(self, name: str, pid: int, vcpus: int, project: str = "shop", vm_fd: int = 9) -> None:
        self.key = VmKey(pid, 77, vm_fd)
        self.vm = Vm(f"id-{name}", self.key, Owner("qemu", name=name, uuid=f"id-{name}", project=project), 1.7e9)
        self.vcpus = [FakeVcpu(pid + vm_fd + 1 + number) for number in range(vcpus)]
        self.protection = Protection.ARMED
        self.window: int | None = 128_000
        self.is_readable = True
        self.source = "bpf"

    def read(self) -> VmReading:
        if not self.is_readable:
            counters = VmCounters(problem="no memory")
            return VmReading(self.vm, "", (), len(self.vcpus), counters, self.protection)
        vcpus = tuple(Vcpu(number, 2 * number, vcpu.tid) for number, vcpu in enumerate(self.vcpus))
        counters = VmCounters(
            tuple(vcpu.vcpu_id for vcpu in vcpus),
            tuple(vcpu.tid for vcpu in vcpus),
            {
                NOTIFY_WINDOW_EXITS: tuple(vcpu.notify_exits for vcpu in self.vcpus),
                EXITS: tuple(vcpu.exits for vcpu in self.vcpus),
            },
            notify_window_cycles=self.window,
        )
        return VmReading(self.vm, self.source, vcpus, len(vcpus), counters, self.protection)


class FakeHost:
    """A reader, a tracer and a trigger in one; ``clock`` is the loop's."""

    def __init__(self, clock: Callable[[], float], *vms: FakeVm, host: Host = INTEL) -> None:
        self.clock = clock
        self.vms = list(vms)
        self.host = host
        self.polls: list[float] = []
        self.reads: list[tuple[float, VmKey, int]] = []
        self.failure = ""
        self.kvm_changes = 0
        self.armed_at: dict[int, float] = {}
        self.armed_times: list[tuple[int, float, float]] = []
        self.most_armed = 0
        self.loses = False
        self.cpu_time_fails = False
        self.garbles = False  # what a trace gives makes no sense
        self.dead_threads: set[int] = set()
        self.strangers: set[int] = set()
        self.refusal: SourceUnavailable | None = None
        self.refused_threads: set[int] = set()
        self.warm = False
        self.cooled_while_armed = False
        self.trigger: FakeTrigger | None = None
        self.pidfds: dict[VmKey, tuple[int, int]] = {}
        self.closed = False
        self.is_patched = False
        """Whether KVM itself tells where notify exits are."""
        self.has_registers = True
        self.rip_sources: tuple[str, ...] = ("bpf",)
        """Of which sources' vCPUs it tells then."""
        self.unread_vms: set[VmKey] = set()
        """Of which no single vCPU can be read."""

    def vcpus(self) -> list[FakeVcpu]:
        return [vcpu for vm in self.vms for vcpu in vm.vcpus]

    async def live(self) -> None:
        """Let guests live while nobody looks."""
        while True:
            busy = any(vcpu.behaviour != "idle" for vm in self.vms if vm for vcpu in vm.vcpus)
            await asyncio.sleep(0.01 if busy else 0.25)
            if all(self.vms):
                self.settle()

    def settle(self) -> None:
        for vm in self.vms:
            for vcpu in vm.vcpus:
                vcpu.live(self.clock(), self._tell)

    def _tell(self, vcpu: FakeVcpu, seconds: float) -> None:
        if self.trigger is not None and not vcpu.untold:
            self.trigger.tell(vcpu, seconds)

    def set(self, vcpu: FakeVcpu, behaviour: str, interval: float = 0.01) -> None:
        self.settle()
        vcpu.behaviour, vcpu.interval = behaviour, interval

    # the reader
    def read(self) -> Snapshot:
        self.settle()
        self.polls.append(self.clock())
        if self.failure:
            raise RuntimeError(self.failure)
        readings = tuple(vm.read() for vm in self.vms)
        sources = (SourceReport("bpf", up=True),)
        return Snapshot(self.clock(), 1.7e9, self.host, readings, sources, {}, kvm_changes=self.kvm_changes)

    def read_vcpu(self, key: VmKey, vcpu_id: int) -> Reading | None:
        self.settle()
        self.reads.append((self.clock(), key, vcpu_id))
        for vm in self.vms:
            if vm.key == key and key not in self.unread_vms and vm.is_readable and vcpu_id < 2 * len(vm.vcpus):
                vcpu = vm.vcpus[vcpu_id // 2]
                registers = {"rax": 1, "rcx": vcpu.rcx, "rip": 3} if self.has_registers else {}
                kernel = vcpu.statistics.read() if self.is_patched else None
                return Reading(registers, False, vcpu.notify_exits, vcpu.exits, vcpu.untraceable, kernel)
        return None

    def read_cpu_time(self, pid: int, tid: int) -> float | None:
        self.settle()
        if self.cpu_time_fails:
            raise RuntimeError("no CPU time")
        return next((vcpu.cpu_seconds for vcpu in self.vcpus() if vcpu.tid == tid), None)

    # the tracer
    def open(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def arm(self, tid: int) -> FakeArmed:
        if self.refusal is not None:
            raise self.refusal
        if tid in self.refused_threads:
            raise SourceUnavailable("SELinux forbids it", "allow it")
        for vcpu in self.vcpus():
            if vcpu.tid == tid and tid not in self.dead_threads:
                return FakeArmed(self, vcpu)
        raise VmGone(f"no thread {tid}")

    def hold_warm(self) -> None:
        self.warm = True

    def release_warm(self) -> None:
        self.cooled_while_armed |= any(vcpu.armed for vcpu in self.vcpus())
        self.warm = False

    def close(self) -> None:
        self.closed = True
        self.warm = False

    # processes
    def hold(self, key: VmKey) -> int:
        if key not in [vm.key for vm in self.vms]:
            raise VmGone(f"no process {key.pid}")
        read, write = os.pipe()
        self.pidfds[key] = (read, write)
        return read

    def end(self, vm: FakeVm) -> None:
        """Let a VM's process end: its pidfd becomes readable."""
        self.settle()
        self.vms.remove(vm)
        _, write = self.pidfds.pop(vm.key, (-1, -1))
        if write >= 0:
            os.close(write)

    def is_thread(self, pid: int, tid: int) -> bool:
        return tid not in self.strangers

    def make_trigger(self, on_call: Callable[[NotifyCall], None]) -> FakeTrigger:
        self.trigger = FakeTrigger(self, on_call)
        return self.trigger


class FakeTrigger:
    def __init__(self, host: FakeHost, on_call: Callable[[NotifyCall], None]) -> None:
        self._host, self._on_call = host, on_call
        self.status = TriggerStatus("handle_notify", True)
        self.refusal: SourceUnavailable | None = None
        self.fd = -1
        self._calls: list[NotifyCall] = []
        self._told: dict[int, float] = {}
        self.invalid: dict[VcpuThread, int] = {}
        self.unreadable = False
        self.lost = (0, 0)

    def open(self) -> TriggerStatus:
        if self.refusal is not None:
            raise self.refusal
        if self.status.attached:
            self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        return self.status

    def tell(self, vcpu: FakeVcpu, seconds: float) -> None:
        """As the BPF program does."""
        if self.fd >= 0 and seconds - self._told.get(vcpu.tid, -AGAIN_SECONDS) >= AGAIN_SECONDS:
            self._told[vcpu.tid] = seconds
            number, vm = next((vm.vcpus.index(vcpu), vm) for vm in self._host.vms if vcpu in vm.vcpus)
            self._calls.append(NotifyCall(round(seconds * 1e9), vm.key.pid, vcpu.tid, 2 * number))
            os.eventfd_write(self.fd, 1)

    def deliver(self) -> int:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        calls, self._calls = self._calls, []
        for call in calls:
            self._on_call(call)
        return len(calls)

    def read_context_invalid(self) -> dict[VcpuThread, int]:
        if self.unreadable:
            raise OSError(12, "no memory")
        return dict(self.invalid)

    def forget(self, ended: Collection[tuple[int, ...]]) -> None:
        self.invalid = {t: count for t, count in self.invalid.items() if t not in ended and t[:2] not in ended}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
