"""Pieces of PromQL: selectors that hold to the dashboard's variables, joins, and the guest time that was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from exporter.prometheus import metrics as m
from exporter.prometheus.metrics import Metric, MetricType

# Prometheus gives this to each of its targets.
UP: Final = Metric("up", MetricType.GAUGE, "Whether the last scrape of a target succeeded.")
# It keeps each alert as a series, with the labels of whatever it is about, and since when it has had a reason.
_ALERT_LABELS: Final = ("alertname", "severity", "vm", "name", "display_name", "project", "vm_namespace", "microcode")
ALERTS: Final = Metric("ALERTS", MetricType.GAUGE, "Alerts that fire or are pending.", ("alertstate", *_ALERT_LABELS))
ALERT_ACTIVE_SINCE: Final = Metric("ALERTS_FOR_STATE", MetricType.GAUGE, "Unix time.", _ALERT_LABELS)

# What kvm-notify-recording.rules.yml records each minute: of VMs that take notify exits only, and by host.
VM_EXIT_RATE: Final = Metric(
    "vm:kvm_vm_notify_window_exits:rate5m", MetricType.GAUGE, "Notify exits per second, where there are any.", ("vm",)
)
VM_INFO_LABELS: Final = tuple(label for label in m.VM_INFO.labels if label != "pid")
VM_NOTIFIED: Final = Metric(
    "vm:kvm_vm_info:notified", MetricType.GAUGE, "Names and owners of those VMs.", VM_INFO_LABELS
)
HOST_EXIT_RATE: Final = Metric(
    "instance:kvm_host_notify_window_exits:rate5m",
    MetricType.GAUGE,
    "Notify exits per second of hosts with armed vCPUs.",
)
HOST_ARMED_VCPUS: Final = Metric(
    "instance:kvm_host_vcpus_armed:sum", MetricType.GAUGE, "Armed vCPUs of hosts that have any."
)
HOST_SECONDS_LOST: Final = Metric(
    "instance:kvm_vm_notify_lost_seconds:rate5m", MetricType.GAUGE, "Guest time lost, in vCPU-seconds per second."
)
AGENT_SCRAPED: Final = Metric(
    "instance:kvm_exporter_scraped:bool", MetricType.GAUGE, "Whether an agent is scraped; also 0 if it is lost."
)

# The dashboards.
FLEET_UID: Final = "kvm-notify-fleet"
HOST_UID: Final = "kvm-notify-host"
VM_UID: Final = "kvm-notify-vm"

HOST_KEYS: Final = "job, instance"
VM_KEYS: Final = "job, instance, vm"
OWNER: Final = "name, display_name, project, vm_namespace"
CPU: Final = "cpu_model_name, cpu_family, cpu_model, cpu_stepping, microcode"


def select(metric: Metric, **equal: str) -> str:
    """Return a selector of the chosen jobs and instances; raises ValueError for a label that the metric has not.

    A value that is a variable stands for all that were chosen.
    """
    if unknown := equal.keys() - set(metric.labels):
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
    matchers = ['job=~"$job"', 'instance=~"$instance"', *(_match(*pair) for pair in equal.items())]
    return f"{metric.name}{{{', '.join(matchers)}}}"


def _match(label: str, value: str) -> str:
    return f'{label}=~"{value}"' if value.startswith("$") else f'{label}="{value}"'


def rate(metric: Metric, **equal: str) -> str:
    """Return a counter's increase per second."""
    return f"rate({select(metric, **equal)}[$__rate_interval])"


def increase(metric: Metric, **equal: str) -> str:
    """Return a counter's increase over the dashboard's whole time range."""
    return f"increase({select(metric, **equal)}[$__range])"


def name_few(few: str, keys: str = VM_KEYS, *, info: Sequence[Metric] = (m.VM_INFO,)) -> str:
    """Return ``few`` series by ``keys`` with names and owners of kvm_vm_info; without them where it is not kept.

    Only the VMs that matter are made unique: to do that for each VM of a fleet takes seconds. A graph over a fleet
    needs an ``info`` of few VMs besides: else every VM's would be read for every point in time.
    """
    known = " or ".join(select(metric) for metric in info)
    known = f"({known})" if len(info) > 1 else known
    named = f"topk by ({VM_KEYS}) (1, {known} and on ({VM_KEYS}) ({few}))"
    return f"(({few}) * on ({VM_KEYS}) group_left ({OWNER}) {named}) or on ({keys}) ({few})"


def call_by_name(expr: str, keys: str) -> str:
    """Return a query that bears labels of kvm_vm_info by ``keys`` and what people call its VMs and their owners.

    ``who`` is the first of the user's name, the VMM's name and the id that is known; ``owner`` the project, or the
    namespace; "" if neither is known. So a table has two columns for what would else be five.
    """
    called = (("who", "vm"), ("who", "name"), ("who", "display_name"), ("owner", "vm_namespace"), ("owner", "project"))
    for label, source in called:
        expr = f'label_replace({expr}, "{label}", "$1", "{source}", "(.+)")'
    return f"max by ({keys}, who, owner) ({expr})"


def lead_to_what_is_known(expr: str) -> str:
    """Return a query that says where its rows are, and bears which dashboard that leads to, for links.

    ``where`` is a host or, of what is about many, a text that sorts before them. Then the host's link, and so that of a
    VM where there is none, leads to the fleet's dashboard, with all of it chosen: Grafana takes "All" for that.
    """
    for label, value, source, pattern in (
        ("where", "(many hosts)", "instance", ""),
        ("where", "$1", "instance", "(.+)"),
        ("host_board", FLEET_UID, "instance", ""),
        ("host_board", HOST_UID, "instance", ".+"),
        ("vm_board", "$1", "host_board", "(.+)"),
        ("vm_board", VM_UID, "vm", ".+"),
        ("instance", "All", "instance", ""),
        ("job", "All", "job", ""),
    ):
        expr = f'label_replace({expr}, "{label}", "{value}", "{source}", "{pattern}")'
    return expr


def tell_by(expr: str, alertname: str, **labels: str) -> str:
    """Return a query whose rows bear the alert that is about them, and those labels."""
    for label, value in {"alertname": alertname, **labels}.items():
        expr = f'label_replace({expr}, "{label}", "{value}", "instance", ".*")'
    return expr


def count_or_zero(found: str, known: str) -> str:
    """Return how many series there are in ``found``: 0 if ``known`` has any, and nothing if it has none."""
    return f"count({found}) or 0 * count({known})"


def with_cpu(expr: str) -> str:
    """Return a query by host with the labels that name its CPU and microcode."""
    info = f"topk by (job, instance) (1, {select(m.HOST_INFO)})"
    return f"{expr} * on (job, instance) group_left ({CPU}) {info}"


def guest_seconds_lost(exits: str, **equal: str) -> str:
    """Return notify exits by VM (or rates of them) times how long the guest stood still for each.

    That is the shortest interval seen on the host between two of them at one RIP, with the VM's own window: its value
    becomes the label by which the interval is found. No result where the window is not known or no interval was seen.
    """
    window = f'count_values by ({VM_KEYS}) ("window_cycles", {select(m.VM_NOTIFY_WINDOW, **equal)})'
    interval = f"max by (job, instance, window_cycles) ({select(m.HOST_INTERVAL_MIN)})"
    return (
        f"{exits} * on ({VM_KEYS}) group_left (window_cycles) {window}"
        f" * on (job, instance, window_cycles) group_left () {interval}"
    )


def vm_seconds_lost(exits: str, **equal: str) -> str:
    """Return the guest time lost by VM; ``exits`` is rate() or increase() of the VM's counter."""
    return guest_seconds_lost(f"sum by ({VM_KEYS}) ({exits})", **equal)


def count_stalled() -> str:
    """Return how many vCPUs of each host are stalled now; no 0 of a host whose agent does not see every VM."""
    counted = f"max by ({HOST_KEYS}) ({select(m.HOST_NO_PROGRESS)})"
    return f"({counted} > 0 or {counted} unless on ({HOST_KEYS}) {select(m.COMPLETE)} == 0)"


def find_stalled() -> str:
    """Return the vCPUs that are stalled now."""
    return f"max by ({VM_KEYS}, vcpu) ({select(m.VCPU_NO_PROGRESS)}) == 1"


def name_stalled(*info: Metric) -> str:
    """Return the vCPUs that are stalled now, by the names of their VMs and owners where those are known."""
    keys = f"{VM_KEYS}, vcpu"
    return call_by_name(name_few(find_stalled(), keys, info=info), keys)


def of_now(expr: str, keys: str, current: Metric) -> str:
    """Return ``expr`` over a time range of those only that are there now: a table of now has no rows of the dead."""
    return f"{expr} and on ({keys}) {select(current)}"


def seen_agents(expr: str) -> str:
    """Return ``expr`` of targets that were this agent in the time range.

    ``up`` is there for every target of Prometheus, and the choice "All" of jobs means every job.
    """
    return f"{expr} and on (job, instance) last_over_time({select(m.HOST_INFO)}[$__range])"


AGENTS: Final = f"min by ({HOST_KEYS}) ({select(AGENT_SCRAPED)})"
ARMED_VCPUS: Final = f"sum by ({HOST_KEYS}) ({select(m.HOST_VCPUS, protection='armed')})"
HOST_EXITS: Final = f"sum by ({HOST_KEYS}) ({increase(m.HOST_NOTIFY_WINDOW_EXITS)})"
