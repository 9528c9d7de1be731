"""A drill: a stall that is not real, through everything that a real one goes through, to test who is called.

The agent's detector is fed simulated records of one vCPU, so that the log line, the metric, the API and the alert come
about as they would for a real one. All of them are marked, and the metric is another one (``kvm_vcpu_drill``). After a
minute the simulated vCPU goes on. The guest itself is not touched, and a real stall of the same vCPU is found and
reported meanwhile.

Only clients that the agent knows can ask for a drill, and no web page can: it takes a header that a browser sends to
another site only after asking that site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from exporter.stalls.detector import StallDetector
from exporter.stalls.verdicts import StallRule, VcpuReport, Verdict
from kvm.model import NotifyExit, Snapshot, VmReading

DRILL_SECONDS: Final = 60.0
# No guest runs here: bits 62 to 48 of an address have to be like bit 47.
DRILL_RIP: Final = 0xD5111_0000_0000_000


class NoDrill(ValueError):
    """A drill cannot be had; the message is for who asked."""


def find_vm(snapshot: Snapshot, name: str) -> VmReading:
    """Find a VM by its id or by its name; raises NoDrill where there is none, or more than one."""
    found = [
        reading
        for reading in snapshot.readings
        if name and name in (reading.vm.id, reading.vm.owner.name, reading.vm.owner.display_name)
    ]
    exact = [reading for reading in found if reading.vm.id == name] or found
    if not exact:
        raise NoDrill(f"no VM is called {name!r}; /metrics has kvm_vm_info with all names and ids")
    if len(exact) > 1:
        raise NoDrill(f"{len(exact)} VMs are called {name!r}: give an id ({', '.join(r.vm.id for r in exact)})")
    if not exact[0].vcpus:
        raise NoDrill(f"the vCPUs of VM {name!r} cannot be read: {exact[0].counters.problem}")
    return exact[0]


class Drill:
    """One drill, of the first vCPU of a VM; ``ends_at`` is CLOCK_MONOTONIC seconds."""

    def __init__(self, reading: VmReading, rule: StallRule, now: float) -> None:
        self.ends_at = now + DRILL_SECONDS
        self._reading = reading
        self._rule = rule
        self._detector = StallDetector(rule, now)

    def begin(self, now: float) -> Sequence[VcpuReport]:
        """Let the simulated vCPU be stuck, and return what is found out about it."""
        detector, exits = self._detector, self._rule.exits
        began = now - self._rule.seconds - 0.1
        changes = [*detector.observe_records(began, [self._make_record(began), self._make_record(began + 0.01)])]
        detector.start_window(began + 0.01)
        changes += detector.observe_records(began, [self._make_record(began + 0.02)])
        changes += detector.observe_counter(began + 0.03, began + 0.03, 0)
        changes += detector.observe_counter(began + 0.04, began + 0.04, exits)
        changes += detector.observe_records(now, [self._make_record(now)])
        return [self.report(verdict) for verdict in changes]

    def end(self, now: float) -> Sequence[VcpuReport]:
        """Let the simulated vCPU go on."""
        return [self.report(verdict) for verdict in self._detector.observe_records(now, [], other_rip=True)]

    def report(self, verdict: Verdict | None = None) -> VcpuReport:
        """Return what is known of the simulated vCPU, in the place of the real one."""
        return VcpuReport(
            vm=self._reading.vm,
            vcpu=self._reading.vcpus[0],
            verdict=verdict or self._detector.verdict,
            source=self._reading.source,
            traced_exits=self._detector.traced_exits,
            same_rip_exits=self._detector.same_rip_exits,
            drill=True,
        )

    def _make_record(self, seconds: float) -> NotifyExit:
        return NotifyExit(round(seconds * 1e9), self._reading.vcpus[0].tid or 0, DRILL_RIP, 0, 0)
