"""Runs drills, one at a time, and has each of their verdicts reported as a real one would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from exporter.stalls.drill import DRILL_SECONDS, Drill, NoDrill, find_vm
from exporter.stalls.verdicts import StallRule, VcpuReport
from kvm.model import Snapshot

_NEVER: Final = float("inf")


class Drills:
    """The drill that is under way, if any; ``tell`` takes what is found out about its vCPU, and when."""

    def __init__(self, rule: StallRule, tell: Callable[[VcpuReport, float], None]) -> None:
        self._rule, self._tell = rule, tell
        self._drill: Drill | None = None

    @property
    def ends_at(self) -> float:
        """When the drill under way ends; infinity where there is none."""
        return _NEVER if self._drill is None else self._drill.ends_at

    def start(self, snapshot: Snapshot, name: str, now: float) -> VcpuReport:
        """Begin a drill with a VM, by its id or its name; raises NoDrill."""
        if self._drill is not None:
            raise NoDrill(f"a drill is under way; it ends within {DRILL_SECONDS:.0f} s")
        drill = self._drill = Drill(find_vm(snapshot, name), self._rule, now)
        for report in drill.begin(now):
            self._tell(report, now)
        return drill.report()

    def end_if_due(self, now: float) -> None:
        """End the drill whose time is over."""
        drill = self._drill
        if drill is not None and now >= drill.ends_at:
            self._drill = None
            for report in drill.end(now):
                self._tell(report, now)

    def report(self) -> tuple[VcpuReport, ...]:
        """Return what is known of the drill's vCPU, nothing where there is none; from any thread."""
        drill = self._drill
        return () if drill is None else (drill.report(),)
