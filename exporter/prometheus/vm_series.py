"""The sample lines of one VM, kept from snapshot to snapshot: most of them never change.

A ``VmSeries`` serves for as long as the VM's identity and vCPUs are the same objects (or equal ones); the numbers are
given anew at each look. What it gives is the same list as before where nothing has moved: then the lines of the whole
host need not be put together anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from exporter.prometheus import metrics
from exporter.prometheus.exposition import SampleLines, escape_label_value, render_sample
from exporter.prometheus.metrics import Metric, order_labels
from kvm.errors import MalformedData
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Protection, VmReading

Rendered = list[tuple[Metric, str]]
"""Lines of any number of metrics, those of one metric in one text."""

VCPU_COUNTERS: tuple[tuple[str, Metric], ...] = (
    (NOTIFY_WINDOW_EXITS, metrics.VCPU_NOTIFY_WINDOW_EXITS),
    (EXITS, metrics.VCPU_EXITS),
)


class VcpuSeries(StrEnum):
    """Which vCPUs have series of their own (``--vcpu-series``)."""

    ALL = "all"
    ACTIVE = "active"
    NONE = "none"


class VmSeries:
    """Renders the lines of one VM; made from its first reading and asked with each.

    ``vm_label`` is the label ``vm`` as it is printed: what tells series apart.
    """

    def __init__(self, reading: VmReading, vcpu_series: VcpuSeries) -> None:
        self.vm_label = escape_label_value(reading.vm.id)
        self._vm = reading.vm
        self._vcpus = reading.vcpus
        self._vcpu_series = vcpu_series
        self._state: tuple[object, ...] = ()
        self._vm_lines: Rendered = []
        self._positions: Sequence[int] = ()
        self._templates: dict[str, SampleLines] = {}
        self._vcpu_reading: VmReading | None = None
        self._vcpu_lines: Rendered = []

    def fits(self, reading: VmReading) -> bool:
        """Tell whether these lines are about this reading's VM and vCPUs."""
        if self._vm is reading.vm and self._vcpus is reading.vcpus:
            return True
        if self._vm != reading.vm or self._vcpus != reading.vcpus:
            return False
        self._vm, self._vcpus = reading.vm, reading.vcpus
        return True

    def render_vm(self, reading: VmReading) -> Rendered:
        """Render what is told of the VM as a whole: who it is, how it is protected, the sum of its notify exits."""
        counters = reading.counters
        state = (
            reading.source,
            reading.vcpu_count,
            reading.protection,
            counters.notify_window_cycles,
            counters.per_vcpu.get(NOTIFY_WINDOW_EXITS),
            counters.totals.get(NOTIFY_WINDOW_EXITS),
        )
        if state != self._state:
            self._vm_lines = _render_vm(reading)
            self._state = state
        return self._vm_lines

    def render_vcpus(self, reading: VmReading) -> Rendered:
        """Render the counters of the VM's vCPUs, one text for each metric that was read.

        Raises MalformedData where the numbers cannot be told to belong to the vCPUs: one vCPU's number on another's
        series would be a wrong number, and two equal series would cost the whole scrape.
        """
        if reading is not self._vcpu_reading:
            self._vcpu_lines = self._render_columns(reading)
            self._vcpu_reading = reading
        return self._vcpu_lines

    def _render_columns(self, reading: VmReading) -> Rendered:
        columns = reading.counters.per_vcpu
        positions = _find_positions(reading, self._vcpu_series)
        if positions != self._positions:
            self._positions = positions
            self._templates = {}
        lines: Rendered = []
        for statistic, metric in VCPU_COUNTERS:
            column = columns.get(statistic)
            if column is None or not positions:
                continue
            if len(column) != len(self._vcpus):
                raise MalformedData(
                    f"{reading.source} of VM {self._vm.id!r}",
                    f"{len(column)} values of {statistic} for {len(self._vcpus)} vCPUs",
                )
            lines.append((metric, self._render_column(statistic, metric, column)))
        return lines

    def render_last_moves(self, last_moves: Mapping[int, float]) -> Rendered:
        """Render when each vCPU was last seen to take a notify exit; those that never did are left out."""
        metric = metrics.VCPU_LAST_NOTIFY_EXIT
        return [
            (metric, render_sample(metric, (str(vcpu.index), self._vm.id), last_moves[vcpu.vcpu_id]))
            for vcpu in self._vcpus
            if vcpu.vcpu_id in last_moves
        ]

    def _render_column(self, statistic: str, metric: Metric, column: tuple[int, ...]) -> str:
        lines = self._templates.get(statistic)
        if lines is None:
            if len({vcpu.index for vcpu in self._vcpus}) != len(self._vcpus):
                raise MalformedData(f"VM {self._vm.id!r}", "two of its vCPUs have the same number")
            label_sets = [(str(self._vcpus[position].index), self._vm.id) for position in self._positions]
            lines = self._templates[statistic] = SampleLines(metric, label_sets)
        if len(self._positions) < len(column):
            column = tuple([column[position] for position in self._positions])
        return lines.render(column)


def sum_notify_exits(reading: VmReading) -> int | None:
    """Return the VM's sum of notify exits; None unless every vCPU is in it."""
    column = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS)
    if column is not None and len(column) == len(reading.vcpus) == reading.vcpu_count:
        return sum(column)
    return reading.counters.totals.get(NOTIFY_WINDOW_EXITS)


def _find_positions(reading: VmReading, series: VcpuSeries) -> Sequence[int]:
    """Find which vCPUs, by their place in ``reading.vcpus``, are to have series."""
    if series is VcpuSeries.ALL:
        return range(len(reading.vcpus))
    if series is VcpuSeries.NONE:
        return ()
    notify_exits = reading.counters.per_vcpu.get(NOTIFY_WINDOW_EXITS, ())
    return tuple([position for position, value in enumerate(notify_exits) if value > 0])


def _render_vm(reading: VmReading) -> Rendered:
    vm, owner = reading.vm, reading.vm.owner
    # Alerts are routed by project and vm_namespace: only what somebody vouches for may say whose VM it is.
    is_vouched = owner.identity.is_vouched
    info = order_labels(
        metrics.VM_INFO,
        vm=vm.id,
        name=owner.name,
        display_name=owner.display_name if is_vouched else "",
        uuid=owner.uuid,
        vmm=owner.vmm,
        pid=str(vm.key.pid),
        project=owner.project if is_vouched else "",
        vm_namespace=owner.namespace if is_vouched else "",
        identity=owner.identity,
        uid="" if owner.uid is None else str(owner.uid),
    )
    claims = order_labels(
        metrics.VM_CLAIMED_INFO,
        vm=vm.id,
        display_name=owner.display_name,
        project=owner.project,
        vm_namespace=owner.namespace,
    )
    has_claims = not is_vouched and bool(owner.display_name or owner.project or owner.namespace)
    samples: list[tuple[Metric, Sequence[str], float | None]] = [
        (metrics.VM_INFO, info, 1),
        (metrics.VM_CLAIMED_INFO, claims, 1 if has_claims else None),
        (metrics.VM_SOURCE_INFO, (reading.source, vm.id), 1 if reading.source else None),
        (metrics.VM_START_TIME, (vm.id,), vm.start_time_seconds),
        (metrics.VM_VCPUS, (vm.id,), reading.vcpu_count),
    ]
    if reading.protection is Protection.ARMED:
        samples.append((metrics.VM_NOTIFY_WINDOW, (vm.id,), reading.counters.notify_window_cycles))
    samples.append((metrics.VM_NOTIFY_WINDOW_EXITS, (vm.id,), sum_notify_exits(reading)))
    lines = [(metric, render_sample(metric, labels, value)) for metric, labels, value in samples if value is not None]
    states = [
        render_sample(metrics.VM_NOTIFY_PROTECTION, (state, vm.id), int(state is reading.protection))
        for state in Protection
    ]
    return [*lines, (metrics.VM_NOTIFY_PROTECTION, "".join(states))]
