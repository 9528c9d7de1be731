"""The dashboard of one host (or a few): what it is, its VMs, and how its agent fares."""

from __future__ import annotations

from exporter.prometheus import metrics as m
from grafana.builder.annotations import change_annotation, stall_annotation
from grafana.builder.colors import GREEN_UNTIL_ONE, PROTECTION, PROTECTION_COLORS, SCRAPED, WARN_FROM_ONE, YES_NO
from grafana.builder.first_screen import make_stalled_table
from grafana.builder.host_agent import make_agent_row, make_tracing_row
from grafana.builder.layout import (
    Json,
    Row,
    instance_variable,
    job_variable,
    link_to_vm,
    render_dashboard,
)
from grafana.builder.panels import COUNT, PER_HOUR, Query, make_graph, make_stat
from grafana.builder.queries import (
    HOST_KEYS,
    HOST_UID,
    UP,
    VM_KEYS,
    call_by_name,
    count_or_zero,
    count_stalled,
    increase,
    name_few,
    of_now,
    rate,
    seen_agents,
    select,
    vm_seconds_lost,
)
from grafana.builder.statistics import make_statistics_row
from grafana.builder.tables import JOB, Column, count_of, hide, make_table


def render() -> Json:
    """Return the dashboard."""
    return render_dashboard(
        uid=HOST_UID,
        title="KVM notify exits: host",
        description="Notify VM exits of one KVM host: its VMs, who of them is stalled, and how its agent fares.",
        time_from="now-6h",
        variables=[job_variable(), instance_variable(all_first=False)],
        annotations=[
            stall_annotation(
                f"max by (instance, vm, vcpu) (max_over_time({select(m.VCPU_NO_PROGRESS)}[$__rate_interval])) == 1",
                "vCPU {{vcpu}} of VM {{vm}} stalled",
                "It made no forward progress. The mark ends up to one rate interval late.",
            ),
            change_annotation(),
        ],
        rows=[
            _what_it_is(),
            _exits(),
            _vms(),
            make_statistics_row(600, HOST_KEYS, "{{instance}}"),
            make_agent_row(),
            make_tracing_row(),
        ],
    )


def _what_it_is() -> Row:
    labels = "cpu_model_name, cpu_family, cpu_model, cpu_stepping, microcode, kernel, kvm_module, lockdown"
    return Row(
        1,
        "Host $instance",
        [
            make_table(
                2,
                "What it is",
                "CPU, kernel and KVM as the agent sees them, and the agent's version. Support: whether it can have "
                "notify exits.",
                {
                    "info": f"max by ({HOST_KEYS}, {labels}) ({select(m.HOST_INFO)})",
                    "supported": f"max by ({HOST_KEYS}) ({select(m.HOST_NOTIFY_SUPPORTED)})",
                    "build": f"max by ({HOST_KEYS}, version) ({select(m.BUILD_INFO)})",
                },
                [
                    Column(field="instance", title="Host", width=210),
                    Column(field="cpu_model_name", title="CPU", width=160, grows=True),
                    Column(field="cpu_family", title="Family", width=72),
                    Column(field="cpu_model", title="Model", width=70),
                    Column(field="cpu_stepping", title="Stepping", width=90),
                    Column(field="microcode", title="Microcode", width=110),
                    Column(field="kernel", title="Kernel", width=140),
                    Column(field="kvm_module", title="KVM module", width=110),
                    Column(field="lockdown", title="Lockdown", width=100),
                    Column(field="supported", title="Support", width=80, mappings=YES_NO),
                    Column(field="version", title="Agent", width=80),
                    JOB,
                ],
                sort_by=["Host"],
                rows=1,
            ),
            make_stat(
                3,
                "Stalled vCPUs",
                "vCPUs that are stuck at one RIP now; not known where RIPs cannot be had, or VMs may be missing.",
                Query(f"sum({count_stalled()})"),
                thresholds=GREEN_UNTIL_ONE,
            ),
            make_stat(
                4,
                "Notify exits",
                "Notify VM exits in the time range, those of VMs that are gone among them; not known of a host that "
                "does not answer.",
                Query(f"sum({of_now(increase(m.HOST_NOTIFY_WINDOW_EXITS), HOST_KEYS, m.HOST_INFO)})"),
                unit=COUNT,
                decimals=0,
            ),
            make_stat(5, "VMs", "VMs on this host.", Query(f"sum({select(m.HOST_VMS)})")),
            make_stat(
                6,
                "VMs not read",
                "VMs whose counters no source could read: they have no counts, and that is not 0.",
                Query(
                    count_or_zero(
                        f"{select(m.VM_INFO)} unless on ({VM_KEYS}) {select(m.VM_SOURCE_INFO)}",
                        select(m.VM_INFO),
                    )
                ),
                no_value="no VMs, or not known",
                thresholds=WARN_FROM_ONE,
            ),
            make_stat(
                9,
                "Agent",
                "Whether Prometheus can scrape the host's agent; if not, everything here is of the time before, or not "
                "known.",
                Query(f"min({seen_agents(select(UP))})"),
                mappings=SCRAPED,
            ),
            make_stat(
                8,
                "Traced vCPUs",
                "vCPU threads whose exits are traced now; none while nothing happens.",
                Query(f"sum({select(m.TRACED_VCPUS)})"),
            ),
            make_stalled_table(
                21,
                rate(m.VM_NOTIFY_WINDOW_EXITS),
                m.VM_INFO,
                rows=3,
                no_value="no vCPU is known to be stalled; while the agent is down, nobody can tell",
            ),
        ],
    )


def _exits() -> Row:
    top = f"topk(10, sum by ({VM_KEYS}) ({rate(m.VM_NOTIFY_WINDOW_EXITS)}) > 0)"
    lost = vm_seconds_lost(rate(m.VM_NOTIFY_WINDOW_EXITS))
    return Row(
        10,
        "Notify exits",
        [
            make_graph(
                11,
                "Notify exits",
                "Of the host, those of VMs that are gone among them. The axis is logarithmic from 1 on.",
                [Query(f"sum by ({HOST_KEYS}) ({rate(m.HOST_NOTIFY_WINDOW_EXITS)}) * 3600", "{{instance}}")],
                unit=PER_HOUR,
                lines=4,
                linear_below=1,
            ),
            make_graph(
                12,
                "Notify exits of the top VMs",
                "The ten VMs with the highest rate at each point in time. The axis is logarithmic from 1 on.",
                [Query(f"{call_by_name(name_few(top), VM_KEYS)} * 3600", "{{who}}")],
                unit=PER_HOUR,
                lines=4,
                last=False,
                linear_below=1,
                links=[link_to_vm("__field.labels")],
                no_value="no VM is known to take notify exits",
            ),
            make_graph(
                13,
                "Stalled vCPUs",
                "vCPUs that are stuck at one RIP; not known where RIPs cannot be had.",
                [Query(f"max by ({HOST_KEYS}) ({select(m.HOST_NO_PROGRESS)})", "{{instance}}")],
                unit=COUNT,
            ),
            make_graph(
                14,
                "Guest time lost",
                "Notify exits times the shortest interval between two of them with that window: 100 % is one vCPU that "
                "gets nothing done. Empty until the agent has seen a stall with that window.",
                [Query(f"sum by ({HOST_KEYS}) ({lost})", "{{instance}}")],
                unit="percentunit",
                lines=4,
            ),
            make_graph(
                15,
                "VMs by protection",
                "armed: notify exits are on. off: the host could, the VMM did not ask. unsupported: the host cannot. "
                "unknown: it could not be found out.",
                [Query(f"sum by (protection) ({select(m.HOST_VMS)})", "{{protection}}")],
                unit=COUNT,
                lines=4,
                stacked=True,
                colors=PROTECTION_COLORS,
            ),
            make_graph(
                16,
                "Shortest interval between notify exits",
                "Shortest time seen between two notify exits in a row at one RIP, by the VM's window: the window and "
                "the CPU's own threshold take no longer. The agent forgets it when it restarts.",
                [
                    Query(
                        f"max by ({HOST_KEYS}, window_cycles) ({select(m.HOST_INTERVAL_MIN)})",
                        "{{instance}}, window {{window_cycles}} cycles",
                    )
                ],
                unit="s",
                lines=4,
                no_value="no interval has been seen",
            ),
        ],
    )


def _vms() -> Row:
    exits = increase(m.VM_NOTIFY_WINDOW_EXITS)
    return Row(
        20,
        "VMs",
        [
            make_table(
                22,
                "VMs",
                "All VMs of now. An empty cell is not 0: it is not known. Time lost is exits in the time range times "
                "the shortest interval between two with that window.",
                {
                    "named": call_by_name(select(m.VM_INFO), f"{VM_KEYS}, vmm"),
                    "vcpus": f"max by ({VM_KEYS}) ({select(m.VM_VCPUS)})",
                    "state_info": f"max by ({VM_KEYS}, state) ({select(m.VM_NOTIFY_PROTECTION)} == 1)",
                    "read_by": f"max by ({VM_KEYS}, source) ({select(m.VM_SOURCE_INFO)})",
                    "window": f"max by ({VM_KEYS}) ({select(m.VM_NOTIFY_WINDOW)})",
                    "exits": of_now(f"sum by ({VM_KEYS}) ({exits})", VM_KEYS, m.VM_INFO),
                    "lost": of_now(f"sum by ({VM_KEYS}) ({vm_seconds_lost(exits)})", VM_KEYS, m.VM_INFO),
                    "stalled": f"sum by ({VM_KEYS}) ({select(m.VCPU_NO_PROGRESS)})",
                    "started": f"max by ({VM_KEYS}) ({select(m.VM_START_TIME)}) * 1000",
                },
                [
                    Column(field="who", title="VM", width=170, grows=True, links=[link_to_vm()]),
                    Column(field="owner", title="Owner", width=110),
                    count_of("stalled", "vCPUs stalled", 128, thresholds=GREEN_UNTIL_ONE),
                    count_of("exits", "Notify exits", 120),
                    Column(field="lost", title="Time lost", width=100, unit="s"),
                    Column(field="state", title="Protection", width=110, mappings=PROTECTION),
                    count_of("vcpus", "vCPUs", 72),
                    count_of("window", "Window (cycles)", 144),
                    Column(field="source", title="Source", width=80),
                    Column(field="vmm", title="VMM", width=80),
                    Column(field="started", title="Started", width=104, unit="dateTimeFromNow"),
                    hide("vm"),
                    hide("instance"),
                    JOB,
                ],
                sort_by=["vCPUs stalled", "Notify exits"],
                rows=10,
            ),
        ],
    )
