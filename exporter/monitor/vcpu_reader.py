"""Reads single vCPUs, their registers and counters, where that works; where not, says once why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from exporter.monitor.backends import Reading
from exporter.stalls.kernel_evidence import KernelCounts
from kvm import abi
from kvm.errors import SourceUnavailable
from kvm.model import EXITS, IRQ_EXITS, NOTIFY_WINDOW_EXITS, RIP_STATISTICS, VcpuKey, VcpuState, VmKey

log = logging.getLogger(__name__)


class VcpuReader:
    """What reads a vCPU; ``left_out`` while that does not work. ``read_vcpu`` is None where nothing can."""

    def __init__(
        self,
        read_vcpu: Callable[[VmKey, int], Reading | None] | None,
        rip_sources: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.left_out = read_vcpu is None
        self._read_vcpu, self._rip_sources = read_vcpu, rip_sources
        self._problem = ""

    @property
    def tells_rips(self) -> bool:
        """Whether KVM itself tells where notify exits are, so that nothing has to be traced."""
        return not self.left_out and bool(self._rip_sources())

    def tells_rips_of(self, source: str) -> bool:
        """Tell whether KVM does so of vCPUs whose counters come from a source: it may be unread for others."""
        return not self.left_out and source in self._rip_sources()

    def try_again(self) -> None:
        """Let the next read be tried, whatever has become of the last ones."""
        self.left_out = self._read_vcpu is None

    def read(self, key: VcpuKey) -> Reading | None:
        """Read one vCPU, None where it is gone or cannot be read; in a worker thread."""
        if self._read_vcpu is None or self.left_out:
            return None
        try:
            return self._read_vcpu(key.vm, key.vcpu_id)
        except SourceUnavailable as err:
            self.left_out = True
            if str(err) != self._problem:
                self._problem = str(err)
                fields = {"reason": err.reason, "remedy": err.remedy}
                log.warning("registers cannot be read: a long REP will look like a stall", extra={"fields": fields})
            return None


def find_obstacle(state: VcpuState) -> str | None:
    """Say why a vCPU's exits must not be traced, "" where they may be, None where it was not read what it is.

    To make a record KVM reads the guest's RIP. Of a TD it must not: for one that is debugged, Linux 7.3 warns of that,
    and a host with panic_on_warn ends.
    """
    if state.vm_type == abi.KVM_X86_TDX_VM:
        return "it is a TD: its RIP cannot be known, and its exits are never traced"
    if not state.registers:
        return None
    return "KVM cannot read the registers of this guest" if state.state_protected else ""


def make_vcpu_reader(
    read_vcpu: Callable[[VmKey, int], VcpuState | None],
) -> Callable[[VmKey, int], Reading | None]:
    """Return what reads a vCPU for the detector: its current registers, and counters."""

    def read(key: VmKey, vcpu_id: int) -> Reading | None:
        state = read_vcpu(key, vcpu_id)
        if state is None:
            return None
        counts = [state.statistics.get(name) for name in (NOTIFY_WINDOW_EXITS, EXITS)]
        if counts[0] is None or counts[1] is None:
            raise SourceUnavailable("this kernel does not describe its statistics of a vCPU")
        registers = {name: value for name, value in state.registers.items() if name not in state.stale}
        obstacle, kernel = find_obstacle(state), read_kernel_counts(state.statistics)
        return Reading(registers, state.guest_mode, counts[0][0], counts[1][0], obstacle, kernel)

    return read


def read_kernel_counts(statistics: Mapping[str, Sequence[int]]) -> KernelCounts | None:
    """Return what KVM says of a vCPU's notify exits; None where it lacks any of the statistics."""
    names = (*RIP_STATISTICS, NOTIFY_WINDOW_EXITS, EXITS, IRQ_EXITS)
    if not statistics.keys() >= set(names):
        return None
    repeats, stuck, invalid, rip, guest_mode, streak, notify_exits, exits, interrupts = (
        statistics[n][0] for n in names
    )
    return KernelCounts(repeats, stuck, invalid, rip, bool(guest_mode), streak, notify_exits, exits, interrupts)
