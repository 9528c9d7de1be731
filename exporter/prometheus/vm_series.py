"""The sample lines of one VM, kept from snapshot to snapshot: most of them never change.

A ``VmSeries`` serves for as long as the VM's identity and vCPUs are the same objects (or equal ones); the numbers are
given anew in each snapshot. What it gives is the same list as before where nothing has moved: then the lines of the
whole host need not be put together anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from exporter.prometheus import metrics
from exporter.prometheus.exposition import Column, escape_label_value, make_template, render_labels, render_sample
from exporter.prometheus.grouped_lines import Rendered
from exporter.prometheus.metrics import Metric, order_labels
from exporter.prometheus.vcpu_lines import VcpuLines
from exporter.prometheus.vm_verdicts import VmVerdicts
from kvm.errors import MalformedData
from kvm.model import EXITS, NOTIFY_WINDOW_EXITS, Protection, VmReading

VCPU_COUNTERS: tuple[tuple[str, Metric], ...] = (
    (NOTIFY_WINDOW_EXITS, metrics.VCPU_NOTIFY_WINDOW_EXITS),
    (EXITS, metrics.VCPU_EXITS),
)


class VcpuSeries(StrEnum):
    """Which vCPUs have series of their own (``--vcpu-series``)."""

    ALL = "all"
    ACTIVE = "active"
    NONE = "none"


class VmLabels(StrEnum):
    """What metrics say of a VM (``--web.labels``): with ``IDS`` neither its names nor its owner, nor what is claimed.

    The series are the same ones, and a label without a value is none to Prometheus: so rules and joins go on working.
    """

    FULL = "full"
    IDS = "ids"


class VmSeries:
    """Renders the lines of one VM; made from its first reading and asked with each.

    ``vm_label`` is the label ``vm`` as it is printed: what tells series apart.
    """

    def __init__(
        self, reading: VmReading, vcpu_series: VcpuSeries = VcpuSeries.ALL, vm_labels: VmLabels = VmLabels.FULL
    ) -> None:
        self.vm_label = escape_label_value(reading.vm.id)
        self._vm = reading.vm
        self._vcpus = reading.vcpus
        self._vcpu_series = vcpu_series
        self._vm_labels = vm_labels
        self._protection: tuple[object, ...] = ()
        self._vm_lines: Rendered = []
        self._positions: Sequence[int] = range(len(reading.vcpus))
        self._templates: dict[Metric, bytes] = {}
        self._sum_template = b""
        self.moves_series = b""
        """What ``name_moves`` gives, once it was asked."""
        self._vcpu_ids = tuple([vcpu.vcpu_id for vcpu in reading.vcpus])
        self._labels: Sequence[bytes] = ()
        self._last_moves: VcpuLines | None = None
        self.verdicts = VmVerdicts(reading.vcpus, self._make_template)
        """What ``StallSeries`` tells of the VM."""

    def fits(self, reading: VmReading) -> bool:
        """Tell whether these lines are about this reading's VM and vCPUs."""
        if self._vm is reading.vm and self._vcpus is reading.vcpus:
            return True
        if self._vm != reading.vm or self._vcpus != reading.vcpus:
            return False
        self._vm, self._vcpus = reading.vm, reading.vcpus
        return True

    def render_vm(self, reading: VmReading) -> Rendered:
        """Render what is told of the VM as a whole and changes seldom: who it is, and how it is protected."""
        protection = find_protection(reading)
        if protection != self._protection:
            self._vm_lines = _render_vm(reading, self._vm_labels)
            self._protection = protection
        return self._vm_lines

    def take_sum(self, reading: VmReading) -> Column | None:
        """Take the sum of the VM's notify exits, None where it is not known."""
        total = reading.notify_exits
        if total is None:
            return None
        metric = metrics.VM_NOTIFY_WINDOW_EXITS
        if not self._sum_template:
            self._sum_template = make_template(metric, [(self._vm.id,)])
        return metric, self._sum_template, (total,)

    def take_columns(self, reading: VmReading) -> list[Column]:
        """Take the counters of the VM's vCPUs that are to be shown, one column for each metric that was read.

        Raises MalformedData where the numbers cannot be told to belong to the vCPUs: one vCPU's number on another's
        series would be a wrong number, and two equal series would cost the whole scrape.
        """
        numbers = reading.counters.per_vcpu
        if self._vcpu_series is not VcpuSeries.ALL:
            self._choose_active(numbers.get(NOTIFY_WINDOW_EXITS, ()))
        columns: list[Column] = []
        for statistic, metric in VCPU_COUNTERS:
            column = numbers.get(statistic)
            if column is None or not self._positions:
                continue
            if len(column) != len(self._vcpus):
                raise MalformedData(
                    f"{reading.source} of VM {self._vm.id!r}",
                    f"{len(column)} values of {statistic} for {len(self._vcpus)} vCPUs",
                )
            if len(self._positions) < len(column):
                column = tuple([column[position] for position in self._positions])
            template = self._templates.get(metric)
            if template is None:
                template = self._templates[metric] = self._make_template(metric, self._positions)
            columns.append((metric, template, column))
        return columns

    def _choose_active(self, notify_exits: Sequence[int]) -> None:
        positions = tuple([position for position, value in enumerate(notify_exits) if value > 0])
        if positions != self._positions:
            self._positions = positions
            self._templates = {}

    def _make_template(self, metric: Metric, positions: Iterable[int]) -> bytes:
        return make_template(metric, self._find_labels(positions))

    def _render_labels(self) -> Sequence[bytes]:
        """Render the labels of each vCPU: those of any metric of vCPUs."""
        if not self._labels:
            found = self._find_labels(range(len(self._vcpus)))
            self._labels = [render_labels(metrics.VCPU_LAST_NOTIFY_EXIT.labels, values).encode() for values in found]
        return self._labels

    def _find_labels(self, positions: Iterable[int]) -> list[tuple[str, str]]:
        if len({vcpu.index for vcpu in self._vcpus}) != len(self._vcpus):
            raise MalformedData(f"VM {self._vm.id!r}", "two of its vCPUs have the same number")
        return [(str(self._vcpus[at].index), self._vm.id) for at in positions]

    def name_moves(self) -> bytes:
        """Name the series that tell when each vCPU was last seen to take a notify exit, one to a line."""
        if not self.moves_series:
            name = metrics.VCPU_LAST_NOTIFY_EXIT.name.encode()
            self.moves_series = b"".join([b"%b%b\n" % (name, labels) for labels in self._render_labels()])
        return self.moves_series

    def render_last_moves(self, last_moves: Mapping[int, float]) -> list[bytes]:
        """Render when each vCPU was last seen to take a notify exit; those that never did are left out."""
        if self._last_moves is None:
            self._last_moves = VcpuLines(metrics.VCPU_LAST_NOTIFY_EXIT, self._render_labels())
        self._last_moves.put([*map(last_moves.get, self._vcpu_ids)])
        return self._last_moves.render()


ShownVm = tuple[VmReading, VmSeries]


def find_protection(reading: VmReading) -> tuple[object, ...]:
    """Return all that ``render_vm`` tells of a VM besides who it is."""
    return reading.source, reading.vcpu_count, reading.protection, reading.counters.notify_window_cycles


def _render_vm(reading: VmReading, vm_labels: VmLabels) -> Rendered:
    vm, owner = reading.vm, reading.vm.owner
    # Alerts are routed by project and vm_namespace: only what somebody vouches for may say whose VM it is.
    is_vouched = owner.identity.is_vouched
    has_claims = not is_vouched and bool(owner.display_name or owner.project or owner.namespace)
    if vm_labels is VmLabels.IDS:
        owner = replace(owner, name="", display_name="", project="", namespace="")
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
    samples: list[tuple[Metric, Sequence[str], float | None]] = [
        (metrics.VM_INFO, info, 1),
        (metrics.VM_CLAIMED_INFO, claims, 1 if has_claims else None),
        (metrics.VM_SOURCE_INFO, (reading.source, vm.id), 1 if reading.source else None),
        (metrics.VM_START_TIME, (vm.id,), vm.start_time_seconds),
        (metrics.VM_VCPUS, (vm.id,), reading.vcpu_count),
    ]
    if reading.protection is Protection.ARMED:
        samples.append((metrics.VM_NOTIFY_WINDOW, (vm.id,), reading.counters.notify_window_cycles))
    lines = [(metric, render_sample(metric, labels, value)) for metric, labels, value in samples if value is not None]
    states = [
        render_sample(metrics.VM_NOTIFY_PROTECTION, (state, vm.id), int(state is reading.protection))
        for state in Protection
    ]
    return [*lines, (metrics.VM_NOTIFY_PROTECTION, b"".join(states))]
