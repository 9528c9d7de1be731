"""The rows of the fleet's dashboard about its members: VMs, hosts, agents."""

from __future__ import annotations

from exporter.prometheus import metrics as m
from grafana.builder.colors import GREEN_UNTIL_ONE, IS_BAD, YES_NO
from grafana.builder.layout import Row, link_to_host, link_to_vm
from grafana.builder.panels import COUNT, PER_HOUR, Query, make_graph
from grafana.builder.queries import (
    AGENTS,
    ARMED_VCPUS,
    HOST_EXITS,
    HOST_KEYS,
    HOST_SECONDS_LOST,
    VM_EXIT_RATE,
    VM_KEYS,
    VM_NOTIFIED,
    call_by_name,
    count_stalled,
    increase,
    name_few,
    of_now,
    rate,
    select,
)
from grafana.builder.tables import JOB, Column, count_of, hide, make_table


def make_vms_row() -> Row:
    """Return the row about who is stalled, and who takes the most notify exits."""
    # One sample a minute, as in the recording rules. A subquery would hold the samples of all VMs at once.
    exits = f"sum_over_time({select(VM_EXIT_RATE)}[$__range])"
    fastest = f"topk(10, sum by ({VM_KEYS}) ({select(VM_EXIT_RATE)}))"
    rates = call_by_name(name_few(fastest, info=[VM_NOTIFIED]), VM_KEYS)
    top = f"topk(10, sum by ({VM_KEYS}) ({exits}) * 60)"
    return Row(
        30,
        "VMs",
        [
            make_table(
                32,
                "Top VMs",
                "The ten VMs with the most notify exits in the time range, from rates over 5 minutes, recorded each "
                "minute. Such a rate lags: of a VM that still takes exits, those of some 2 minutes are not in it yet; "
                "the dashboards of host and VM have them. Names are there where kvm_vm_info is kept.",
                {"exits": call_by_name(name_few(top, info=[m.VM_INFO, VM_NOTIFIED]), VM_KEYS)},
                [
                    Column(field="who", title="VM", width=180, links=[link_to_vm()]),
                    Column(field="owner", title="Owner", width=120),
                    count_of("exits", "Notify exits", 120),
                    Column(field="instance", title="Host", width=160, grows=True, links=[link_to_host()]),
                    JOB,
                    hide("vm"),
                ],
                sort_by=["Notify exits"],
                rows=10,
                width=12,
                no_value="no VM is known to take notify exits",
            ),
            make_graph(
                33,
                "Notify exits of the top VMs",
                "The ten VMs with the highest rate over 5 minutes at each point in time, as it is recorded. The "
                "axis is logarithmic from 1 on.",
                [Query(f"{rates} * 3600", "{{who}} on {{instance}}")],
                unit=PER_HOUR,
                lines=4,
                last=False,
                linear_below=1,
                links=[link_to_vm("__field.labels")],
                no_value="no VM is known to take notify exits",
            ),
        ],
    )


def make_hosts_row() -> Row:
    """Return the row about what each host is and how it fares."""
    rates = f"sum by ({HOST_KEYS}) ({rate(m.HOST_NOTIFY_WINDOW_EXITS)})"
    by_host = {
        "info": f"max by ({HOST_KEYS}, cpu_model_name, microcode, kernel) ({select(m.HOST_INFO)})",
        "supported": f"max by ({HOST_KEYS}) ({select(m.HOST_NOTIFY_SUPPORTED)})",
        "vms": f"sum by ({HOST_KEYS}) ({select(m.HOST_VMS)})",
        "armed_vcpus": ARMED_VCPUS,
        "exits": of_now(HOST_EXITS, HOST_KEYS, m.HOST_INFO),
        "stalled": count_stalled(),
    }
    return Row(
        40,
        "Hosts",
        [
            make_table(
                41,
                "Hosts",
                "What each host is and how it fares. An empty cell is not 0: it is not known. Support: whether it can "
                "have notify exits.",
                by_host,
                [
                    Column(field="instance", title="Host", width=240, links=[link_to_host()]),
                    count_of("stalled", "vCPUs stalled", 128, thresholds=GREEN_UNTIL_ONE),
                    count_of("exits", "Notify exits", 120),
                    count_of("vms", "VMs", 70),
                    count_of("armed_vcpus", "vCPUs armed", 112),
                    Column(field="supported", title="Support", width=80, mappings=YES_NO),
                    Column(field="cpu_model_name", title="CPU", width=180, grows=True),
                    Column(field="microcode", title="Microcode", width=110),
                    Column(field="kernel", title="Kernel", width=140),
                    JOB,
                ],
                sort_by=["vCPUs stalled", "Notify exits"],
                rows=10,
            ),
            make_graph(
                42,
                "Hosts with the most notify exits",
                "The ten hosts with the highest rate at each point in time. The axis is logarithmic from 1 on.",
                [Query(f"topk(10, {rates} > 0) * 3600", "{{instance}}")],
                unit=PER_HOUR,
                lines=4,
                last=False,
                linear_below=1,
                links=[link_to_host("__field.labels")],
                no_value="no host is known to take notify exits",
            ),
            make_graph(
                43,
                "Guest time lost",
                "Notify exits times the shortest interval between two of them with that window: 100 % is one vCPU that "
                "gets nothing done. Ten hosts with the most, as it is recorded. Empty until an agent has seen a stall "
                "with that window.",
                [Query(f"topk(10, sum by ({HOST_KEYS}) ({select(HOST_SECONDS_LOST)}) > 0)", "{{instance}}")],
                unit="percentunit",
                lines=4,
                last=False,
                links=[link_to_host("__field.labels")],
                no_value="no guest time is known to be lost",
            ),
        ],
    )


def make_agents_row() -> Row:
    """Return the row about what keeps agents from seeing everything."""
    unread = f"{select(m.VM_INFO)} unless on ({VM_KEYS}) {select(m.VM_SOURCE_INFO)}"
    problems = {
        "down": f"1 - {AGENTS} == 1",
        "sourceless": f"(1 - max by ({HOST_KEYS}) ({select(m.SOURCE_UP)})) == 1",
        "unread": f"count by ({HOST_KEYS}) ({unread})",
        "errors": of_now(f"sum by ({HOST_KEYS}) ({increase(m.READ_ERRORS)}) > 0", HOST_KEYS, m.BUILD_INFO),
        "failing": f"count by ({HOST_KEYS}) ({select(m.SCRAPE_SUCCESS)} == 0)",
        "lost": of_now(f"sum by ({HOST_KEYS}) ({increase(m.TRACE_LOST_RECORDS)}) > 0", HOST_KEYS, m.BUILD_INFO),
        "incomplete": f"1 - max by ({HOST_KEYS}) ({select(m.COMPLETE)}) == 1",
    }
    return Row(
        50,
        "Agents",
        [
            make_table(
                51,
                "Agents with problems",
                "Hosts that need attention, and why. The agent's log and its page at / give the reason. An error that "
                "happened once since the agent started is not counted yet. An empty cell says that nothing was found, "
                "also where the series are not kept: for VMs not read, kvm_vm_info and kvm_vm_source_info.",
                problems,
                [
                    Column(field="instance", title="Host", width=180, grows=True, links=[link_to_host()]),
                    Column(field="down", title="Down", width=70, mappings=IS_BAD),
                    Column(field="incomplete", title="VMs may be missing", width=168, mappings=IS_BAD),
                    Column(field="sourceless", title="No source works", width=144, mappings=IS_BAD),
                    count_of("unread", "VMs not read", 120),
                    count_of("errors", "Read errors", 112),
                    count_of("failing", "Collectors that fail", 184),
                    count_of("lost", "Trace records lost", 168),
                    JOB,
                ],
                sort_by=["Down", "Read errors"],
                rows=5,
                no_value="no problem is known",
            ),
            make_graph(
                52,
                "Hosts on which a source works",
                "debugfs does not work under Secure Boot, and need not. What matters is that one source does.",
                [Query(f"sum by (source) ({select(m.SOURCE_UP)})", "{{source}}")],
                unit=COUNT,
            ),
            make_table(
                53,
                "Versions of the agent",
                "How many hosts run which version.",
                {"hosts": f"count by (version, revision) ({select(m.BUILD_INFO)})"},
                [
                    Column(field="version", title="Version", width=120),
                    Column(field="revision", title="Revision", width=160, grows=True),
                    count_of("hosts", "Hosts", 70),
                ],
                sort_by=["Hosts"],
                rows=5,
                width=12,
            ),
        ],
        collapsed=True,
    )
