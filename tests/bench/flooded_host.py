"""A host on which every vCPU takes notify exits at once, as after a bad microcode update: snapshots, traces, a trigger.

No kernel can be asked for that here. So the numbers are made, by one clock: each vCPU takes ``RATE`` notify exits a
second, each at another RIP and with other exits between, but for one, the last of the last VM, which is stuck. Each
snapshot reads as many real vCPUs, which stand still, so that it costs what one costs; what they show is not used.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Final

from kvm.bpf.notify_trigger import AGAIN_SECONDS, NotifyCall, TriggerStatus, VcpuThread
from kvm.model import (
    EXITS,
    NOTIFY_WINDOW_EXITS,
    Identity,
    NotifyExit,
    Owner,
    Protection,
    Snapshot,
    SourceReport,
    Vcpu,
    VcpuKey,
    Vm,
    VmCounters,
    VmKey,
    VmReading,
)
from kvm.perf.notify_records import TraceRecords
from kvm.perf.notify_tracer import SESSION_RECORDS
from tests.snapshots import INTEL

RATE: Final = 2.0
STUCK_RATE: Final = 40.0
OTHER_EXITS: Final = 1000.0
RIP: Final = 0xFFFF_FFFF_8100_0000
TIDS_PER_VM: Final = 10_000
TICK_SECONDS: Final = 0.005
TICKS: Final = round(AGAIN_SECONDS / TICK_SECONDS)


class FloodedHost:
    """The SnapshotReader of such a host; ``begin`` starts the flood."""

    def __init__(self, vms: int, vcpus: int, read_real: Callable[[], object]) -> None:
        self.began: float | None = None
        self._read_real, self._reading = read_real, threading.Lock()
        self._vms = []
        for number in range(vms):
            pid = (number + 1) * TIDS_PER_VM
            owner = Owner("qemu", name=f"vm-{number}", project="bench", identity=Identity.LIBVIRT, uid=64055)
            vm = Vm(f"{number:032x}", VmKey(pid, 1, 9), owner, 1.7e9)
            own = tuple(Vcpu(index, index, pid + 1 + index) for index in range(vcpus))
            # The same objects in each snapshot, as a real source gives them.
            self._vms.append((vm, own, tuple(vcpu.vcpu_id for vcpu in own), tuple(vcpu.tid for vcpu in own)))
        self.threads = {vcpu.tid: (vm, vcpu) for vm, own, _, _ in self._vms for vcpu in own}
        vm, own, _, _ = self._vms[-1]
        self.stuck = VcpuKey(vm.key, own[-1].vcpu_id)
        self.stuck_tid = own[-1].tid
        self.stuck_vm = vm.id

    def begin(self) -> None:
        """Let every vCPU take notify exits from now on."""
        self.began = time.monotonic()

    def count(self, tid: int | None, now: float) -> int:
        """Count the notify exits of a vCPU's thread until then."""
        seconds = 0.0 if self.began is None else max(0.0, now - self.began)
        return int(seconds * (STUCK_RATE if tid == self.stuck_tid else RATE))

    def read(self) -> Snapshot:
        """Take a snapshot."""
        with self._reading:
            self._read_real()
        now, unix = time.monotonic(), time.time()
        usual, others = self.count(None, now), int(now * OTHER_EXITS)
        readings = []
        for vm, vcpus, ids, tids in self._vms:
            column, exits = (usual,) * len(vcpus), (others,) * len(vcpus)
            if vm.key == self.stuck.vm and self.began is not None:
                column = (*column[:-1], self.count(self.stuck_tid, now))
                exits = (*exits[:-1], int(self.began * OTHER_EXITS) + column[-1])
            counters = VmCounters(ids, tids, {NOTIFY_WINDOW_EXITS: column, EXITS: exits}, {}, 0, 1)
            readings.append(VmReading(vm, "bpf", vcpus, len(vcpus), counters, Protection.ARMED))
        return Snapshot(now, unix, INTEL, tuple(readings), (SourceReport("bpf", up=True),), {}, composition=self)

    def close(self) -> None:
        """Hold nothing, give nothing back."""


class FloodedThread:
    """An armed thread."""

    def __init__(self, host: FloodedHost, tid: int) -> None:
        self.tid, self._host = tid, host
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._taken = host.count(tid, time.monotonic())
        self._left = SESSION_RECORDS

    def signal(self, now: float) -> None:
        """Make the fd readable where there is something to read."""
        if self.fd >= 0 and self._host.count(self.tid, now) != self._taken:
            with contextlib.suppress(OSError):  # it has just been disarmed
                os.eventfd_write(self.fd, 1)

    def read(self) -> TraceRecords:
        """Return the exits since the last read."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        now = time.monotonic()
        first, self._taken = self._taken, self._host.count(self.tid, now)
        numbers = range(first, self._taken)[: self._left]
        self._left -= len(numbers)
        stuck = self.tid == self._host.stuck_tid
        exits = tuple(
            NotifyExit(int(now * 1e9) - (self._taken - n), self.tid, RIP + (0 if stuck else 64 * n), 0, 0)
            for n in numbers
        )
        return TraceRecords(exits, other_rip=not stuck, ended=not self._left)

    def watch_other_rips(self, rip: int) -> None:
        """Nothing to arm."""

    def refresh(self) -> None:
        """Allow as many records as at first."""
        self._left = SESSION_RECORDS

    def disarm(self) -> None:
        """Close the fd; may be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class FloodedTracer:
    """Arms threads of a flooded host."""

    def __init__(self, host: FloodedHost) -> None:
        self._host = host
        self.cpu_seconds = 0.0
        """What it has taken to make fds readable, which is no part of the monitor."""
        self._armed: list[FloodedThread] = []
        self._ended = threading.Event()
        self._signaller = threading.Thread(target=self._signal, daemon=True)

    def open(self) -> None:
        """Nothing could be missing."""
        if not self._signaller.is_alive():
            self._signaller.start()

    def _signal(self) -> None:
        while not self._ended.wait(1 / STUCK_RATE):
            now = time.monotonic()
            self._armed = [thread for thread in self._armed if thread.fd >= 0]
            for thread in self._armed:
                thread.signal(now)
            self.cpu_seconds = time.thread_time()

    def arm(self, tid: int) -> FloodedThread:
        """Trace a thread."""
        thread = FloodedThread(self._host, tid)
        self._armed.append(thread)
        return thread

    def hold_warm(self) -> None:
        """Nothing is patched."""

    def release_warm(self) -> None:
        """Nothing is patched."""

    def close(self) -> None:
        """Let the signals end."""
        self._ended.set()


class FloodedTrigger:
    """Tells of all threads at once, then of each as often as the BPF programs would, one after the other."""

    def __init__(self, host: FloodedHost, on_call: Callable[[NotifyCall], None]) -> None:
        self._host, self._on_call = host, on_call
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.lost = (0, 0)
        self.told = 0
        self.cpu_seconds = 0.0
        """What it has taken to make the calls, which is no part of the monitor."""
        self._ready: list[NotifyCall] = []
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def open(self) -> TriggerStatus:
        """Attach."""
        self._teller.start()
        return TriggerStatus("handle_notify", True)

    def _tell(self) -> None:
        calls = [(vm.key.pid, tid or 0, vcpu.vcpu_id) for tid, (vm, vcpu) in self._host.threads.items()]
        ticks = 0
        while not self._ended.wait(TICK_SECONDS):
            if self._host.began is not None:
                now = time.monotonic()
                due = int((now - self._host.began) / TICK_SECONDS)
                told = [call for tick in range(ticks, due) for call in calls[tick % TICKS :: TICKS]] if ticks else calls
                self._ready += [NotifyCall(round(now * 1e9), *call) for call in told]
                ticks = max(due, 1)
                os.eventfd_write(self.fd, 1)
            self.cpu_seconds = time.thread_time()

    def deliver(self) -> int:
        """Hand over what has come."""
        with contextlib.suppress(BlockingIOError):  # what has come is told before it is signalled
            os.eventfd_read(self.fd)
        ready, self._ready = self._ready, []
        for call in ready:
            self._on_call(call)
        self.told += len(ready)
        return len(ready)

    def read_context_invalid(self) -> dict[VcpuThread, int]:
        """No exit has an invalid context."""
        return {}

    def forget(self, ended: Collection[tuple[int, ...]]) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Close the fd."""
        self._ended.set()
        self._teller.join()
        os.close(self.fd)
