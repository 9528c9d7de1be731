"""The dashboard of one VM: who it is, and what each of its vCPUs does.

This is the only one that asks for every vCPU's series. With ``--vcpu-series=none`` they are not there, and with
``active`` only those of vCPUs that have taken a notify exit; the VM's own stay.
"""

from __future__ import annotations

from exporter.prometheus import metrics as m
from exporter.prometheus.metrics import Metric
from grafana.builder.annotations import stall_annotation
from grafana.builder.colors import GREEN_UNTIL_ONE, STALLED
from grafana.builder.layout import (
    Json,
    Row,
    instance_variable,
    job_variable,
    link_to_host,
    render_dashboard,
    vm_variable,
)
from grafana.builder.panels import PER_HOUR, Query, make_graph, make_timeline
from grafana.builder.queries import (
    VM_KEYS,
    VM_UID,
    guest_seconds_lost,
    increase,
    rate,
    select,
)
from grafana.builder.statistics import make_statistics_row
from grafana.builder.tables import JOB, Column, count_of, hide, make_table
from grafana.builder.vm_identity import VM, make_identity_row, make_who_row

VCPU_KEYS = f"{VM_KEYS}, vcpu"
VCPU_NAME = "vCPU {{vcpu}} on {{instance}}"
ABSENT = "Absent with --vcpu-series=none; with active, a vCPU's first exits are not in it."


def render() -> Json:
    """Return the dashboard."""
    stalled = select(m.VCPU_NO_PROGRESS, vm=VM)
    return render_dashboard(
        uid=VM_UID,
        title="KVM notify exits: VM",
        description="Notify VM exits of one VM, by vCPU. A VM that migrates is on two hosts for a moment: "
        "choose All instances to see both.",
        time_from="now-1h",
        variables=[job_variable(), instance_variable(all_first=True), vm_variable()],
        annotations=[
            stall_annotation(
                f"max by (instance, vcpu) (max_over_time({stalled}[$__rate_interval])) == 1",
                "vCPU {{vcpu}} stalled",
                "It made no forward progress on {{instance}}. The mark ends up to one rate interval late.",
            )
        ],
        rows=[
            make_who_row(),
            _exits(),
            _verdicts(),
            _vcpus(),
            make_statistics_row(600, VM_KEYS, "VM on {{instance}}", repeat="vm", vm=VM),
            make_identity_row(),
        ],
    )


def _by_vcpu(expr: str) -> str:
    return f"sum by ({VCPU_KEYS}) ({expr})"


def _rate_by_vcpu(metric: Metric) -> str:
    return _by_vcpu(rate(metric, vm=VM))


def _increase_by_vcpu(metric: Metric) -> str:
    return _by_vcpu(increase(metric, vm=VM))


def _exits() -> Row:
    notify, total = _rate_by_vcpu(m.VCPU_NOTIFY_WINDOW_EXITS), _rate_by_vcpu(m.VCPU_EXITS)
    return Row(
        10,
        "Exits of ${vm:text}",
        [
            make_graph(
                11,
                "Notify exits of each vCPU",
                f"VM exits because the guest opened no event window for too long. {ABSENT}",
                [Query(notify, VCPU_NAME)],
                unit="cps",
                lines=4,
                linear_below=0.01,
            ),
            make_graph(
                12,
                "All exits of each vCPU",
                "VM exits of all kinds, notify exits among them. A stuck vCPU takes notify exits and hardly any other. "
                f"{ABSENT}",
                [Query(total, VCPU_NAME)],
                unit="cps",
                lines=4,
                linear_below=0.01,
            ),
            make_graph(
                13,
                "Notify exits of the VM",
                "All vCPUs together; also there with --vcpu-series=none, and where only the VM's sum can be read.",
                [Query(f"sum by ({VM_KEYS}) ({rate(m.VM_NOTIFY_WINDOW_EXITS, vm=VM)})", "VM on {{instance}}")],
                unit="cps",
                lines=4,
                linear_below=0.01,
            ),
            make_graph(
                14,
                "Share of notify exits",
                f"Notify exits among all exits of a vCPU: near 1 while it is stuck. {ABSENT}",
                [Query(f"{notify} / ({total} > 0)", VCPU_NAME)],
                unit="percentunit",
                lines=4,
                maximum=1,
            ),
        ],
        repeat="vm",
    )


def _verdicts() -> Row:
    lost = guest_seconds_lost(_rate_by_vcpu(m.VCPU_NOTIFY_WINDOW_EXITS), vm=VM)
    stalled = f"max by ({VCPU_KEYS}) (max_over_time({select(m.VCPU_NO_PROGRESS, vm=VM)}[$__rate_interval]))"
    return Row(
        20,
        "Verdicts on ${vm:text}",
        [
            make_timeline(
                21,
                "Forward progress",
                "Which vCPUs are stalled. A vCPU is here once it has taken a notify exit; a gap means that it is not "
                "known. A stall ends up to one rate interval late here.",
                Query(stalled, VCPU_NAME),
                mappings=STALLED,
                no_value="no notify exits, or their RIPs cannot be had",
            ),
            make_graph(
                22,
                "Guest time lost",
                "Share of a vCPU's time: its notify exits times the shortest interval between two of them with this "
                f"VM's window. Empty until the agent has seen a stall with that window. {ABSENT}",
                [Query(lost, VCPU_NAME)],
                unit="percentunit",
                lines=4,
            ),
            make_graph(
                23,
                "Traced notify exits",
                "Notify exits whose RIP was seen, and of those the ones at the RIP of the one before. Only some exits "
                f"are traced, so compare the two with each other. {ABSENT}",
                [
                    Query(_rate_by_vcpu(m.VCPU_TRACED_EXITS), "traced, vCPU {{vcpu}}"),
                    Query(_rate_by_vcpu(m.VCPU_SAME_RIP_EXITS), "same RIP, vCPU {{vcpu}}"),
                ],
                unit="cps",
                lines=4,
                no_value="no traced exit is known",
            ),
            make_graph(
                24,
                "Exits with an invalid context",
                "The CPU lost the guest's state: look at hardware and microcode. Absent where handle_notify() cannot "
                "be watched.",
                [Query(f"{_rate_by_vcpu(m.VCPU_CONTEXT_INVALID)} * 3600", VCPU_NAME)],
                unit=PER_HOUR,
                lines=4,
                no_value="none, or not watched",
            ),
        ],
        repeat="vm",
    )


def _vcpus() -> Row:
    return Row(
        30,
        "vCPUs of ${vm:text}",
        [
            make_table(
                31,
                "vCPUs",
                f"Each vCPU over the time range. An empty cell is not 0: it is not known, or there was none. {ABSENT}",
                {
                    "notify": _increase_by_vcpu(m.VCPU_NOTIFY_WINDOW_EXITS),
                    "all": _increase_by_vcpu(m.VCPU_EXITS),
                    "traced": _increase_by_vcpu(m.VCPU_TRACED_EXITS),
                    "same_rip": _increase_by_vcpu(m.VCPU_SAME_RIP_EXITS),
                    "invalid": _increase_by_vcpu(m.VCPU_CONTEXT_INVALID),
                    "stalled": f"max by ({VCPU_KEYS}) ({select(m.VCPU_NO_PROGRESS, vm=VM)})",
                    "last": f"max by ({VCPU_KEYS}) ({select(m.VCPU_LAST_NOTIFY_EXIT, vm=VM)}) * 1000",
                    "lost": _by_vcpu(guest_seconds_lost(_increase_by_vcpu(m.VCPU_NOTIFY_WINDOW_EXITS), vm=VM)),
                },
                [
                    Column(field="vcpu", title="vCPU", width=64),
                    Column(field="stalled", title="Forward progress", width=152, mappings=STALLED),
                    count_of("notify", "Notify exits", 120),
                    count_of("all", "All exits", 120),
                    Column(field="last", title="Last notify exit", width=160, unit="dateTimeAsIso"),
                    Column(field="lost", title="Time lost", width=100, unit="s"),
                    count_of("traced", "Traced", 90),
                    count_of("same_rip", "At the same RIP", 144),
                    count_of("invalid", "Invalid context", 144, thresholds=GREEN_UNTIL_ONE),
                    Column(field="instance", title="Host", width=120, grows=True, links=[link_to_host()]),
                    JOB,
                    hide("vm"),
                ],
                sort_by=["Forward progress", "Notify exits"],
                rows=8,
                no_value="no series of vCPUs: the agent runs with --vcpu-series=none, or reads only the VM's sum",
            ),
        ],
        repeat="vm",
    )
