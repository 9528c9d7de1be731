"""What a snapshot tells of the host as a whole, as metric families."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.build_info import BuildInfo
from exporter.prometheus import metrics
from exporter.prometheus.exposition import Family
from exporter.prometheus.metrics import Metric, order_labels
from kvm.model import Host, Protection, Snapshot, VmReading


def build_host_families(snapshot: Snapshot, total: int | None) -> list[Family]:
    """Build what is told of the CPU, the kernel and KVM; ``total`` is that of notify exits, None where not known."""
    info, notify_exits = Family(metrics.HOST_INFO), Family(metrics.HOST_NOTIFY_WINDOW_EXITS)
    supported, over = Family(metrics.HOST_NOTIFY_SUPPORTED), Family(metrics.HOST_VMS_OVER_BUDGET)
    if not snapshot.host.cpu_unknown_reason:  # empty labels would be an answer
        info.add(order_labels(metrics.HOST_INFO, **name_labels(metrics.HOST_INFO, snapshot.host)), 1)
    if snapshot.host.notify_supported is not None:
        supported.add((), int(snapshot.host.notify_supported))
    if total is not None:
        notify_exits.add((), total)
    over.add((), snapshot.vms_over_budget)
    return [info, supported, notify_exits, over]


def count_vms(readings: Iterable[VmReading]) -> list[Family]:
    """Count VMs and vCPUs by protection, as far as the counts are known."""
    vms, vcpus = Family(metrics.HOST_VMS), Family(metrics.HOST_VCPUS)
    for state in Protection:
        counts = [reading.vcpu_count for reading in readings if reading.protection is state]
        vms.add((state,), len(counts))
        known = [count for count in counts if count is not None]
        if len(known) == len(counts):
            vcpus.add((state,), sum(known))
    return [vms, vcpus]


def build_snapshot_families(snapshot: Snapshot) -> list[Family]:
    """Build how old a snapshot is, and whether VMs may be missing from it."""
    taken, complete = Family(metrics.SNAPSHOT_TIMESTAMP), Family(metrics.COMPLETE)
    reasons = Family(metrics.INCOMPLETE_REASON)
    taken.add((), snapshot.unix_seconds)
    complete.add((), int(snapshot.complete))
    for reason in sorted({spot.reason for spot in snapshot.blind_spots}):
        reasons.add((reason,), 1)
    return [taken, complete, reasons]


def name_labels(metric: Metric, of: Host | BuildInfo) -> dict[str, str]:
    """Return the labels of a metric that says what something is, by name."""
    return {name: str(getattr(of, name)) for name in metric.labels}
