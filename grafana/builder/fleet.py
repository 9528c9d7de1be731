"""The dashboard of all hosts: what they are, whether notify exits are armed, who takes them, and how agents fare.

It is for fleets of many thousand VMs, and for a central Prometheus that keeps few of their series: it asks for series
of hosts, and for what rules record of VMs that take notify exits. Of the vCPUs it asks only for those that are stalled:
a few series, which are there whatever ``--vcpu-series`` says. Names of VMs are there where kvm_vm_info is.
"""

from __future__ import annotations

from exporter.prometheus import metrics as m
from grafana.builder.annotations import stall_annotation
from grafana.builder.colors import GREEN_UNTIL_ONE, PROTECTION_COLORS, WARN_ABOVE_ZERO, WARN_FROM_ONE
from grafana.builder.first_screen import make_alerts_table, make_blind_table, make_stalled_table
from grafana.builder.fleet_members import make_agents_row, make_hosts_row, make_vms_row
from grafana.builder.layout import (
    Json,
    Panel,
    Pile,
    Row,
    instance_variable,
    job_variable,
    render_dashboard,
)
from grafana.builder.panels import COUNT, Query, make_graph, make_stat
from grafana.builder.queries import (
    AGENTS,
    ARMED_VCPUS,
    CPU,
    FLEET_UID,
    HOST_ARMED_VCPUS,
    HOST_EXIT_RATE,
    HOST_EXITS,
    HOST_KEYS,
    VM_EXIT_RATE,
    VM_KEYS,
    VM_NOTIFIED,
    count_or_zero,
    count_stalled,
    increase,
    select,
    with_cpu,
)
from grafana.builder.tables import Column, count_of, hide, make_table

# Two CPUs of one name, stepping and microcode are of one family and model.
CPU_COLUMNS = (
    Column(field="cpu_model_name", title="CPU", width=180, grows=True),
    Column(field="microcode", title="Microcode", width=110),
    hide("cpu_family"),
    hide("cpu_model"),
)


def render() -> Json:
    """Return the dashboard."""
    return render_dashboard(
        uid=FLEET_UID,
        title="KVM notify exits: fleet",
        description="Notify VM exits of all KVM hosts: who is stalled, who is protected, which CPUs take them. "
        "Top VMs, guest time lost and exits a day ask what kvm-notify-recording.rules.yml records.",
        time_from="now-24h",
        variables=[job_variable(), instance_variable(all_first=True)],
        annotations=[
            stall_annotation(
                f"max by (instance) (max_over_time({select(m.HOST_NO_PROGRESS)}[$__rate_interval])) > 0",
                "vCPUs stalled on {{instance}}",
                "At least one vCPU of this host made no forward progress.",
            )
        ],
        refresh="5m",
        rows=[_now(), _cpus(), make_vms_row(), make_hosts_row(), _protection(), make_agents_row()],
    )


def _now() -> Row:
    numbers = _make_numbers()
    return Row(
        1,
        "Now",
        [
            Pile([numbers[:3], numbers[3:]]),
            make_blind_table(9),
            make_stalled_table(
                31,
                select(VM_EXIT_RATE),
                m.VM_INFO,
                VM_NOTIFIED,
                rows=1,
                no_value="no vCPU is known to be stalled",
            ),
            make_alerts_table(8),
        ],
    )


def _make_numbers() -> list[Panel]:
    all_vms, armed_vms = (
        f"sum({selector})" for selector in (select(m.HOST_VMS), select(m.HOST_VMS, protection="armed"))
    )
    hosts = select(m.HOST_INFO)
    untold = f"max by ({HOST_KEYS}) ({hosts}) unless on ({HOST_KEYS}) {select(m.HOST_NO_PROGRESS)}"
    blind = f"{untold} or max by ({HOST_KEYS}) ({select(m.COMPLETE)} == 0)"
    return [
        make_stat(
            2,
            "Stalled vCPUs",
            "vCPUs that are stuck at one RIP now. Hosts where RIPs cannot be had are not in it: see Blind to stalls.",
            Query(f"sum({count_stalled()})"),
            thresholds=GREEN_UNTIL_ONE,
        ),
        make_stat(
            3,
            "Blind to stalls",
            "Hosts where a stall may go unseen: the agent cannot have RIPs, or does not see every VM. Its log says "
            "why.",
            Query(count_or_zero(blind, hosts)),
            thresholds=WARN_FROM_ONE,
        ),
        make_stat(
            7,
            "Agents down",
            "Agents that Prometheus cannot scrape now, and hosts that it has lost while they had VMs: those of the "
            "alert KvmNotifyExporterDown, which waits for 10 minutes. Not known without the recording rules.",
            Query(count_or_zero(f"{AGENTS} == 0", AGENTS)),
            thresholds=GREEN_UNTIL_ONE,
        ),
        make_stat(
            4,
            "Notify exits",
            "Notify VM exits in the time range, those of VMs that are gone among them.",
            Query(f"sum({increase(m.HOST_NOTIFY_WINDOW_EXITS)})"),
            unit=COUNT,
            decimals=0,
        ),
        make_stat(
            5,
            "VMs protected",
            "Share of VMs with notify exits armed.",
            Query(f"{armed_vms} / ({all_vms} > 0)"),
            unit="percentunit",
            no_value="no VMs, or not known",
        ),
        make_stat(
            6,
            "Hosts",
            "Hosts whose agent answers.",
            Query(f"count(max by ({HOST_KEYS}) ({hosts}))"),
            unit=COUNT,
            decimals=0,
        ),
    ]


def _protection() -> Row:
    meaning = (
        "armed: notify exits are on. off: the host could, the VMM did not ask. unsupported: the host cannot. "
        "unknown: it could not be found out. Only where it is armed does a count of 0 mean that nothing happened."
    )
    return Row(
        10,
        "Protection",
        [
            make_graph(
                11,
                "VMs by protection",
                meaning,
                [Query(f"sum by (protection) ({select(m.HOST_VMS)})", "{{protection}}")],
                unit=COUNT,
                lines=4,
                stacked=True,
                colors=PROTECTION_COLORS,
            ),
            make_graph(
                12,
                "vCPUs by protection",
                f"{meaning} A host is left out of a state in which it has a VM whose vCPUs could not be counted.",
                [Query(f"sum by (protection) ({select(m.HOST_VCPUS)})", "{{protection}}")],
                unit=COUNT,
                lines=4,
                stacked=True,
                colors=PROTECTION_COLORS,
            ),
        ],
    )


def _cpus() -> Row:
    group = f"sum by ({CPU})"
    armed = f"{group} ({with_cpu(ARMED_VCPUS)})"
    vms = f"count by ({VM_KEYS}) (count_over_time({select(VM_EXIT_RATE)}[$__range]))"
    vms_hit = f"count by ({HOST_KEYS}) ({vms})"
    interval = f"max by ({HOST_KEYS}, window_cycles) ({select(m.HOST_INTERVAL_MIN)})"
    return Row(
        20,
        "CPU models, steppings and microcode",
        [
            make_table(
                21,
                "Groups of hosts",
                "Hosts by CPU and microcode, those first of which the most hosts and VMs have exits: one guest that "
                "floods makes a large sum and proves nothing. Exits of the whole time range count for the microcode "
                "that a host has now; the graph below shows each at its time. The median is that of the hosts' exits "
                "per armed vCPU and day: as many hosts have more as have less.",
                {
                    "hosts": f"count by ({CPU}) (max by ({HOST_KEYS}, {CPU}) ({select(m.HOST_INFO)}))",
                    "hosts_hit": f"{group} ({with_cpu(f'({HOST_EXITS} > bool 0)')})",
                    "vms_hit": f"{group} ({with_cpu(vms_hit)})",
                    "armed_vcpus": armed,
                    "exits": f"{group} ({with_cpu(HOST_EXITS)})",
                    "per_vcpu_day": _find_median_per_vcpu_day("$__range"),
                },
                [
                    *CPU_COLUMNS,
                    Column(field="cpu_stepping", title="Stepping", width=90),
                    count_of("hosts", "Hosts", 70),
                    count_of("hosts_hit", "Hosts with exits", 152),
                    count_of("vms_hit", "VMs with exits", 136),
                    Column(
                        field="per_vcpu_day",
                        title="Median per vCPU-day",
                        width=176,
                        unit=COUNT,
                        decimals=2,
                        thresholds=WARN_ABOVE_ZERO,
                    ),
                    count_of("exits", "Notify exits", 120),
                    count_of("armed_vcpus", "vCPUs armed", 112),
                ],
                sort_by=["Hosts with exits", "VMs with exits"],
                rows=5,
            ),
            make_graph(
                22,
                "Notify exits a day per armed vCPU, median host",
                "Of each CPU and microcode, over the hour before each point: a microcode update "
                "that moves the CPU's own threshold shows here, and a guest that floods one host does not. The axis is "
                "logarithmic from 1 on.",
                [Query(_find_median_per_vcpu_day("1h"), "{{microcode}} {{cpu_model_name}} {{cpu_stepping}}")],
                unit="short",
                lines=4,
                linear_below=1,
                no_value="no armed vCPU is known",
            ),
            make_table(
                23,
                "Shortest interval between notify exits",
                "Shortest time seen between two notify exits in a row at one RIP, by CPU, microcode and the VM's "
                "window: the window and the CPU's own threshold take no longer. Agents forget it when they restart.",
                {"seconds": f"min by ({CPU}, window_cycles) ({with_cpu(interval)})"},
                [
                    *CPU_COLUMNS,
                    hide("cpu_stepping"),
                    Column(field="window_cycles", title="Window (cycles)", width=144),
                    Column(field="seconds", title="Shortest interval", width=160, unit="s"),
                ],
                sort_by=["Shortest interval"],
                ascending=True,
                rows=5,
                width=12,
                no_value="no interval has been seen",
            ),
        ],
    )


def _find_median_per_vcpu_day(time_range: str) -> str:
    """Return the median, by CPU and microcode, of the hosts' notify exits per armed vCPU and day in the time range.

    Samples of both are taken at the same time, so the ratio needs neither their distance nor the age of the history.
    """
    exits, armed = (
        f"sum by ({HOST_KEYS}) (sum_over_time({select(metric)}[{time_range}]))"
        for metric in (HOST_EXIT_RATE, HOST_ARMED_VCPUS)
    )
    return f"quantile by ({CPU}) (0.5, {with_cpu(f'({exits} * 86400 / {armed})')})"
