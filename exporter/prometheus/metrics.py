"""The table of what is exported: each metric declared once, as data.

``METRICS`` is in the order of the exposition. A test holds that what is produced is what is declared here, and that
the names keep to the conventions of Prometheus (those of ``promtool check metrics``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """The types in use, spelled as in the line ``# TYPE``."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric as it is declared; it is equal to itself only.

    ``name`` is the name of its samples: a counter's ends in ``_total``. ``labels`` are in alphabetical order, in which
    the label values of a sample are given and printed. ``unit`` is "" or the last word of the name (without _total).
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""

    @property
    def family(self) -> str:
        """Return the name of the family in OpenMetrics: without ``_total``."""
        return self.name.removesuffix("_total") if self.type is MetricType.COUNTER else self.name


VCPU_NOTIFY_WINDOW_EXITS = Metric(
    "kvm_vcpu_notify_window_exits_total",
    MetricType.COUNTER,
    "KVM stat notify_window_exits of a vCPU: VM exits because the guest opened no event window for too long.",
    ("vcpu", "vm"),
)
VCPU_EXITS = Metric(
    "kvm_vcpu_exits_total",
    MetricType.COUNTER,
    "KVM stat exits of a vCPU: VM exits of all kinds.",
    ("vcpu", "vm"),
)
VCPU_TRACED_EXITS = Metric(
    "kvm_vcpu_notify_traced_exits_total",
    MetricType.COUNTER,
    "Notify VM exits of a vCPU whose RIP was seen: all of them where KVM itself tells it, else only some, "
    "while the vCPU is traced.",
    ("vcpu", "vm"),
)
VCPU_SAME_RIP_EXITS = Metric(
    "kvm_vcpu_notify_same_rip_exits_total",
    MetricType.COUNTER,
    "Of kvm_vcpu_notify_traced_exits_total, those at the RIP of the one before.",
    ("vcpu", "vm"),
)
VCPU_CONTEXT_INVALID = Metric(
    "kvm_vcpu_notify_context_invalid_exits_total",
    MetricType.COUNTER,
    "Notify VM exits of a vCPU with an invalid VM context since the agent runs, each of them counted; "
    "absent where handle_notify() cannot be attached to, and for vCPUs of whose notify VM exits it tells nothing.",
    ("vcpu", "vm"),
)
VCPU_NO_PROGRESS = Metric(
    "kvm_vcpu_no_forward_progress",
    MetricType.GAUGE,
    "Whether a vCPU is stuck at one RIP, for vCPUs with at least one notify VM exit; absent where that is not known.",
    ("vcpu", "vm"),
)
VCPU_DRILL = Metric(
    "kvm_vcpu_drill",
    MetricType.GAUGE,
    "A drill says that a vCPU is stuck, to test who is called, whatever the vCPU does; always 1, absent without one.",
    ("vcpu", "vm"),
)
VCPU_LAST_NOTIFY_EXIT = Metric(
    "kvm_vcpu_last_notify_exit_timestamp_seconds",
    MetricType.GAUGE,
    "When KVM stat notify_window_exits of a vCPU was last seen to move, as Unix time; absent if never seen.",
    ("vcpu", "vm"),
    "seconds",
)
VM_NOTIFY_WINDOW_EXITS = Metric(
    "kvm_vm_notify_window_exits_total",
    MetricType.COUNTER,
    "KVM stat notify_window_exits summed over all vCPUs of a VM; absent where not every vCPU could be read.",
    ("vm",),
)
VM_INFO = Metric(
    "kvm_vm_info",
    MetricType.GAUGE,
    "Who a VM is, as far as is known, and who vouches for that (identity): libvirt, cgroup and container are root's "
    "word, cmdline and claimed that of whoever runs the VM, process nobody's; always 1.",
    ("display_name", "identity", "name", "pid", "project", "uid", "uuid", "vm", "vm_namespace", "vmm"),
)
VM_CLAIMED_INFO = Metric(
    "kvm_vm_claimed_info",
    MetricType.GAUGE,
    "What a VM's own user says of its owner, which may be another's name; always 1, absent where nothing is claimed.",
    ("display_name", "project", "vm", "vm_namespace"),
)
VM_SOURCE_INFO = Metric(
    "kvm_vm_source_info",
    MetricType.GAUGE,
    "Which source a VM's KVM stats come from; always 1, absent where no source could read the VM.",
    ("source", "vm"),
)
VM_START_TIME = Metric(
    "kvm_vm_start_time_seconds",
    MetricType.GAUGE,
    "When a VM's process started, as Unix time.",
    ("vm",),
    "seconds",
)
VM_VCPUS = Metric(
    "kvm_vm_vcpus",
    MetricType.GAUGE,
    "Number of a VM's vCPUs.",
    ("vm",),
)
VCPU_STALL_START = Metric(
    "kvm_vcpu_stall_start_timestamp_seconds",
    MetricType.GAUGE,
    "When a vCPU that makes no forward progress was first seen at the RIP where it is stuck; only while it is.",
    ("vcpu", "vm"),
    "seconds",
)
VM_NOTIFY_PROTECTION = Metric(
    "kvm_vm_notify_protection",
    MetricType.GAUGE,
    "Whether KVM_CAP_X86_NOTIFY_VMEXIT is enabled for a VM: 1 for the state that holds, 0 for the others.",
    ("state", "vm"),
)
VM_NOTIFY_WINDOW = Metric(
    "kvm_vm_notify_window_cycles",
    MetricType.GAUGE,
    "KVM's notify_window of a VM, in crystal clock cycles, to which the CPU adds a threshold of its own; "
    "only where known and armed.",
    ("vm",),
    "cycles",
)
HOST_INFO = Metric(
    "kvm_host_info",
    MetricType.GAUGE,
    "What the host is: kernel, CPU as in /proc/cpuinfo, lockdown, KVM's vendor module; always 1, absent where "
    "that cannot be read.",
    (
        "cpu_family",
        "cpu_model",
        "cpu_model_name",
        "cpu_stepping",
        "cpu_vendor",
        "kernel",
        "kvm_module",
        "lockdown",
        "microcode",
    ),
)
HOST_NOTIFY_SUPPORTED = Metric(
    "kvm_host_notify_supported",
    MetricType.GAUGE,
    "Whether KVM_CHECK_EXTENSION(KVM_CAP_X86_NOTIFY_VMEXIT) says that this host supports notify VM exits; "
    "absent where KVM could not be asked.",
)
HOST_NOTIFY_WINDOW_EXITS = Metric(
    "kvm_host_notify_window_exits_total",
    MetricType.COUNTER,
    "All increases of KVM stat notify_window_exits that the agent has seen, also of VMs that are gone; absent while "
    "nothing can be read.",
)
HOST_VMS = Metric(
    "kvm_host_vms",
    MetricType.GAUGE,
    "Number of VMs in each state of kvm_vm_notify_protection.",
    ("protection",),
)
HOST_VMS_OVER_BUDGET = Metric(
    "kvm_host_vms_over_budget",
    MetricType.GAUGE,
    "Number of VMs that have no series because their process or their user has too many VMs; the log names the user.",
)
HOST_VCPUS = Metric(
    "kvm_host_vcpus",
    MetricType.GAUGE,
    "Number of vCPUs of the VMs in each state of kvm_vm_notify_protection; "
    "absent for a state with a VM whose vCPUs could not be counted.",
    ("protection",),
)
HOST_NO_PROGRESS = Metric(
    "kvm_host_vcpus_no_forward_progress",
    MetricType.GAUGE,
    "Number of vCPUs that are stuck at one RIP now; absent where RIPs cannot be had.",
)
HOST_INTERVAL_MIN = Metric(
    "kvm_host_notify_interval_min_seconds",
    MetricType.GAUGE,
    "Shortest time seen between two notify VM exits in a row at one RIP, by the VM's window: the window and the CPU's "
    "own threshold take no longer.",
    ("window_cycles",),
    "seconds",
)
STATISTICS_LEFT_OUT = Metric(
    "kvm_exporter_statistics_left_out",
    MetricType.GAUGE,
    "Statistics of KVM that --collector.stats selects and that cannot be exported, by reason: what the kernel says of "
    "them is not understood, or another has the same name; absent where there are none.",
    ("reason",),
)
EVIDENCE = Metric(
    "kvm_exporter_evidence_info",
    MetricType.GAUGE,
    'What tells where notify VM exits are: "kernel", KVM\'s own statistics (kvm/patches), or "trace"; always 1, absent '
    "where nothing does.",
    ("evidence",),
)
POLL_PERIOD = Metric(
    "kvm_exporter_poll_period_seconds",
    MetricType.GAUGE,
    "How often counters are polled for notify VM exits; 0 where nothing needs polling.",
    unit="seconds",
)
TRIGGER_MISSED = Metric(
    "kvm_exporter_trigger_missed_total",
    MetricType.COUNTER,
    "How often a poll found that a vCPU had taken notify VM exits of which the BPF trigger told nothing.",
)
TRACED_VCPUS = Metric(
    "kvm_exporter_traced_vcpus",
    MetricType.GAUGE,
    "Number of vCPU threads whose exits are traced now.",
)
TRACE_ARMINGS = Metric(
    "kvm_exporter_trace_armings_total",
    MetricType.COUNTER,
    "How often a vCPU thread's exits began to be traced.",
)
TRACE_RECORDS = Metric(
    "kvm_exporter_trace_records_total",
    MetricType.COUNTER,
    "Trace records of notify VM exits that were read.",
)
TRACE_LOST_RECORDS = Metric(
    "kvm_exporter_trace_lost_records_total",
    MetricType.COUNTER,
    "Trace records of notify VM exits that were lost or made no sense; they prove nothing.",
)
TRACE_BUDGET_EXHAUSTED = Metric(
    "kvm_exporter_trace_budget_exhausted_total",
    MetricType.COUNTER,
    "Trace sessions of vCPUs that had to wait because enough is traced already.",
)
WARNINGS = Metric(
    "kvm_exporter_warnings_total",
    MetricType.COUNTER,
    "Lines about stalled vCPUs that were logged, drills among them.",
)
WARNINGS_SUPPRESSED = Metric(
    "kvm_exporter_warnings_suppressed_total",
    MetricType.COUNTER,
    "Stalls of vCPUs that were not logged at once, so that no guest can fill the log.",
)
THREADS = Metric(
    "kvm_exporter_threads",
    MetricType.GAUGE,
    "Number of threads of the agent, read every 15 s.",
)
THREAD_CPU = Metric(
    "kvm_exporter_thread_cpu_seconds_total",
    MetricType.COUNTER,
    "CPU time, user and system, of the agent's threads by kind: the event loop (main), and its pools of workers.",
    ("thread",),
    "seconds",
)
CONTEXT_SWITCHES = Metric(
    "kvm_exporter_context_switches_total",
    MetricType.COUNTER,
    "Context switches of the agent: voluntary ones wait for something, involuntary ones were forced on it.",
    ("kind",),
)
COMPLETE = Metric(
    "kvm_exporter_complete",
    MetricType.GAUGE,
    "Whether every VM of this host was seen: 1, or 0 where VMs may be missing and counts of them are absent.",
    (),
)
INCOMPLETE_REASON = Metric(
    "kvm_exporter_incomplete_reason_info",
    MetricType.GAUGE,
    "Why VMs of this host may be missing; always 1, absent where none can be. The page at / says what to do.",
    ("reason",),
)
SNAPSHOT_TIMESTAMP = Metric(
    "kvm_exporter_snapshot_timestamp_seconds",
    MetricType.GAUGE,
    "When the host was read for these metrics: tells the age of a file of the textfile collector.",
    (),
    "seconds",
)
SOURCE_UP = Metric(
    "kvm_exporter_source_up",
    MetricType.GAUGE,
    "Whether a source of KVM stats works on this host; where it does not, the log and the page at / say why.",
    ("source",),
)
READ_ERRORS = Metric(
    "kvm_exporter_read_errors_total",
    MetricType.COUNTER,
    "What was left out because it could not be read or made no sense; the log names the VM and the reason.",
    ("kind", "source"),
)
SCRAPE_DURATION = Metric(
    "kvm_exporter_scrape_collector_duration_seconds",
    MetricType.GAUGE,
    'How long a collector took; collectors "snapshot" (the reading of the host) and "monitor" '
    "(what the stall monitor has found) come before the others.",
    ("collector",),
    "seconds",
)
SCRAPE_SUCCESS = Metric(
    "kvm_exporter_scrape_collector_success",
    MetricType.GAUGE,
    "Whether a collector succeeded.",
    ("collector",),
)
STATE_FILE_SUCCESS = Metric(
    "kvm_exporter_state_file_success",
    MetricType.GAUGE,
    "1 if --state.file could be read and written, else 0: kvm_host_notify_window_exits_total then begins at 0 after a "
    "restart; absent without it.",
)
WEB_CONFIG_RELOAD_SUCCESS = Metric(
    "kvm_exporter_web_config_reload_success",
    MetricType.GAUGE,
    "Whether the last reload of --web.config.file succeeded; where it did not, the one before stays in force and the "
    "log says why. Absent without the flag.",
)
BUILD_INFO = Metric(
    "kvm_exporter_build_info",
    MetricType.GAUGE,
    "Version and revision of this agent, and of the Python that runs it; always 1.",
    ("python_version", "revision", "version"),
)

METRICS: tuple[Metric, ...] = (
    VCPU_NOTIFY_WINDOW_EXITS,
    VCPU_EXITS,
    VCPU_TRACED_EXITS,
    VCPU_SAME_RIP_EXITS,
    VCPU_CONTEXT_INVALID,
    VCPU_NO_PROGRESS,
    VCPU_STALL_START,
    VCPU_DRILL,
    VCPU_LAST_NOTIFY_EXIT,
    VM_NOTIFY_WINDOW_EXITS,
    VM_INFO,
    VM_CLAIMED_INFO,
    VM_SOURCE_INFO,
    VM_START_TIME,
    VM_VCPUS,
    VM_NOTIFY_PROTECTION,
    VM_NOTIFY_WINDOW,
    HOST_INFO,
    HOST_NOTIFY_SUPPORTED,
    HOST_NOTIFY_WINDOW_EXITS,
    HOST_VMS,
    HOST_VMS_OVER_BUDGET,
    HOST_VCPUS,
    HOST_NO_PROGRESS,
    HOST_INTERVAL_MIN,
    SNAPSHOT_TIMESTAMP,
    COMPLETE,
    INCOMPLETE_REASON,
    SOURCE_UP,
    READ_ERRORS,
    STATISTICS_LEFT_OUT,
    EVIDENCE,
    POLL_PERIOD,
    TRIGGER_MISSED,
    TRACED_VCPUS,
    TRACE_ARMINGS,
    TRACE_RECORDS,
    TRACE_LOST_RECORDS,
    TRACE_BUDGET_EXHAUSTED,
    WARNINGS,
    WARNINGS_SUPPRESSED,
    THREADS,
    THREAD_CPU,
    CONTEXT_SWITCHES,
    SCRAPE_DURATION,
    SCRAPE_SUCCESS,
    WEB_CONFIG_RELOAD_SUCCESS,
    STATE_FILE_SUCCESS,
    BUILD_INFO,
)


def order_labels(metric: Metric, **values: str) -> tuple[str, ...]:
    """Return label values in the order of the metric's labels; raises ValueError if the names differ."""
    if values.keys() != set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(values)}")
    return tuple(values[name] for name in metric.labels)
