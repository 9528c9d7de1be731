"""What is to be exported: which collectors, which VMs, which series of vCPUs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from exporter.patterns import NamePattern
from exporter.prometheus.vm_series import VcpuSeries, VmLabels
from kvm.model import Vm

COLLECTORS: Final = ("host", "vm", "vcpu", "exporter", "stats")
DEFAULT_COLLECTORS: Final = COLLECTORS[:-1]


class BadSelection(ValueError):
    """A scrape asks for collectors in a way that cannot be answered; the message is for its sender."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorSettings:
    """What is to be exported.

    ``enabled`` are the collectors that run when a scrape asks for none by name. ``vm_include`` and ``vm_exclude`` are
    searched for in a VM's name and in its id, so they match anywhere in it unless they are anchored, as node_exporter's
    do; a VM is shown if the first one (where given) matches and the second one does not.
    """

    enabled: frozenset[str] = frozenset(DEFAULT_COLLECTORS)
    vcpu_series: VcpuSeries = VcpuSeries.ALL
    vm_labels: VmLabels = VmLabels.FULL
    vm_include: NamePattern | None = None
    vm_exclude: NamePattern | None = None

    def shows(self, vm: Vm) -> bool:
        """Tell whether a VM has series of its own."""
        names = (vm.owner.name, vm.id)
        if self.vm_include and not any(self.vm_include.matches(name) for name in names):
            return False
        return not (self.vm_exclude and any(self.vm_exclude.matches(name) for name in names))


def select_collectors(enabled: Collection[str], collect: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """Choose the collectors for a scrape from its parameters ``collect[]`` and ``exclude[]``, as node_exporter does.

    Raises BadSelection for both at once, and for a name that is unknown or of a collector that is switched off.
    """
    if collect and exclude:
        raise BadSelection("collect[] and exclude[] cannot be combined")
    for name in [*collect, *exclude]:
        if name not in COLLECTORS:
            raise BadSelection(f"no such collector: {name!r}; there are {', '.join(COLLECTORS)}")
    for name in collect:
        if name not in enabled:
            raise BadSelection(f"collector {name!r} is switched off on this agent")
    return frozenset(collect or enabled) - frozenset(exclude)
