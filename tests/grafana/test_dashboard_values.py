"""What the dashboards' queries make of a few samples, as promtool says: units, guards, and what is not known."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from exporter.prometheus import metrics as m
from exporter.prometheus.metrics import Metric, order_labels
from grafana.builder.queries import (
    AGENT_SCRAPED,
    ALERT_ACTIVE_SINCE,
    ALERTS,
    HOST_ARMED_VCPUS,
    HOST_EXIT_RATE,
    HOST_SECONDS_LOST,
    UP,
    VM_EXIT_RATE,
    VM_NOTIFIED,
)
from tests.grafana.dashboard_queries import find_queries
from tests.grafana.dashboard_rules import RECORDING, find_labels_of
from tests.grafana.promql import find_selectors

FLEET, HOST, VM = "kvm-notify-fleet", "kvm-notify-host", "kvm-notify-vm"
GUEST: Final = "5107a7ed-0000-4000-8000-000000000002"
MINUTES: Final = 40
ALERT_RULES: Final = RECORDING.with_name("kvm-notify-alerts.rules.yml")


@dataclass(frozen=True)
class Case:
    """What one query of a panel answers after 40 minutes: ``wanted`` are values by the labels that tell them apart."""

    name: str
    dashboard: str
    place: str
    number: int
    series: Iterable[tuple[str, str]]
    wanted: Mapping[str, float] = field(default_factory=dict)

    def render(self) -> dict[str, Any]:
        """One test in a file for promtool."""
        return {
            "name": self.name,
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in self.series],
            "promql_expr_test": [
                {
                    "expr": find_expr(self.dashboard, self.place, self.number),
                    "eval_time": f"{MINUTES}m",
                    "exp_samples": [{"labels": labels, "value": value} for labels, value in self.wanted.items()],
                }
            ],
        }


def find_expr(dashboard: str, place: str, number: int = 0) -> str:
    """The text of one query; VMs of other names than that of ``GUEST`` are not the VM dashboard's."""
    queries = find_queries(vm=GUEST, rate_interval="5m", range_seconds=3600)
    return [query.expr for query in queries if (query.dashboard, query.place) == (dashboard, place)][number]


def samples(metric: Metric, values: str, instance: str = "a", job: str = "kvm", **labels: str) -> tuple[str, str]:
    """One series of host ``a`` (or another one); raises for a label that the metric has not."""
    own = dict.fromkeys(metric.labels, "") | labels
    if metric.name in {one.name for one in m.METRICS}:
        order_labels(metric, **own)
    elif set(own) - set(find_labels_of(metric.name)):
        raise ValueError(f"{metric.name} has no such labels: {', '.join(own)}")
    target = {"job": job, "instance": instance, **own}
    return f"{metric.name}{{{', '.join(f'{name}={json.dumps(value)}' for name, value in target.items())}}}", values


def still(value: float) -> str:
    return f"{value}x{MINUTES}"


def by_second(count: float) -> str:
    """A counter with that rate."""
    return f"600+{60 * count}x{MINUTES}"


CPU: Final = {"cpu_model_name": "Xeon", "cpu_family": "6", "cpu_model": "143", "cpu_stepping": "8", "microcode": "0x2b"}
CPU_SERIES: Final = '{cpu_family="6", cpu_model="143", cpu_model_name="Xeon", cpu_stepping="8", microcode="0x2b"}'
FLOODED_SERIES: Final = CPU_SERIES.replace("0x2b", "0x99")
INFO_A, INFO_B = samples(m.HOST_INFO, still(1), "a", **CPU), samples(m.HOST_INFO, still(1), "b", **CPU)
ARMED: Final = {"protection": "armed"}
OFF: Final = {"protection": "off"}
VCPU: Final = {"vm": GUEST, "vcpu": "1"}
OF_VCPU: Final = f'{{instance="a", job="kvm", vcpu="1", vm="{GUEST}"}}'
OF_VM: Final = f'{{instance="a", job="kvm", vm="{GUEST}"}}'
NAMED: Final = samples(m.VM_INFO, still(1), vm=GUEST, name="web-1", project="shop")
PROBLEMS = "Agents with problems"
BLIND: Final = (
    samples(AGENT_SCRAPED, still(0), "dead"),
    samples(UP, still(0), "dead"),
    samples(AGENT_SCRAPED, still(0), "lost"),
    samples(m.COMPLETE, still(0), "partial"),
    samples(m.INCOMPLETE_REASON, still(1), "partial", reason="pid_namespace"),
    samples(m.COMPLETE, still(0), "untold"),
    samples(m.COMPLETE, still(0), "crowded"),
    samples(m.INCOMPLETE_REASON, still(1), "crowded", reason="over_budget"),
    samples(m.COMPLETE, still(0), "both"),
    samples(m.INCOMPLETE_REASON, still(1), "both", reason="owners_pending"),
    samples(m.INCOMPLETE_REASON, still(1), "both", reason="no_source"),
    samples(m.HOST_INFO, still(1), "locked", lockdown="confidentiality"),
    samples(m.HOST_INFO, still(1), "untraced", lockdown="integrity"),
)


def _blind(alert: str, state: str, instance: str, reason: str) -> str:
    labels = {"alertname": alert, "state": state, "instance": instance, "job": "kvm", "reason": reason}
    return f"{{{', '.join(f'{name}={json.dumps(value)}' for name, value in labels.items() if value)}}}"


CASES: Final = (
    # Grafana's times are in milliseconds.
    Case(
        "start of a VM",
        VM,
        "Who it is",
        3,
        [samples(m.VM_START_TIME, still(1_700_000_000), vm=GUEST)],
        {OF_VM: 1_700_000_000_000},
    ),
    Case(
        "last notify exit",
        VM,
        "vCPUs",
        7,  # a number has the same title as the table
        [samples(m.VCPU_LAST_NOTIFY_EXIT, still(1_700_000_000), **VCPU)],
        {OF_VCPU: 1_700_000_000_000},
    ),
    Case(
        "start in the table of VMs",
        HOST,
        "VMs",
        9,  # a number has the same title as the table
        [samples(m.VM_START_TIME, still(1_700_000_000), vm=GUEST), samples(m.HOST_VMS, still(1), **ARMED)],
        {OF_VM: 1_700_000_000_000},
    ),
    # A share of nothing is no share.
    Case(
        "share protected",
        FLEET,
        "VMs protected",
        0,
        [samples(m.HOST_VMS, still(3), **ARMED), samples(m.HOST_VMS, still(1), **OFF)],
        {"{}": 0.75},
    ),
    Case(
        "share protected of no VMs",
        FLEET,
        "VMs protected",
        0,
        [samples(m.HOST_VMS, still(0), **ARMED), samples(m.HOST_VMS, still(0), **OFF)],
    ),
    Case(
        "share of notify exits",
        VM,
        "Share of notify exits",
        0,
        [
            samples(m.VCPU_NOTIFY_WINDOW_EXITS, by_second(1), **VCPU),
            samples(m.VCPU_EXITS, by_second(4), **VCPU),
        ],
        {OF_VCPU: 0.25},
    ),
    Case(
        "share of no exits",
        VM,
        "Share of notify exits",
        0,
        [samples(m.VCPU_NOTIFY_WINDOW_EXITS, still(0), **VCPU), samples(m.VCPU_EXITS, still(0), **VCPU)],
    ),
    # 1 exit a second, by 4 vCPUs. Of three hosts, one takes none, and on one a guest floods.
    Case(
        "exits a day over time",
        FLEET,
        "Notify exits a day per armed vCPU, median host",
        0,
        [
            *(samples(m.HOST_INFO, still(1), host, **CPU) for host in "abc"),
            *(samples(HOST_ARMED_VCPUS, still(4), host) for host in "abc"),
            samples(HOST_EXIT_RATE, still(1)),
            samples(HOST_EXIT_RATE, still(0), "b"),
            samples(HOST_EXIT_RATE, still(9000), "c"),
        ],
        {CPU_SERIES: 21_600},
    ),
    Case(
        "exits a day of no armed vCPUs",
        FLEET,
        "Notify exits a day per armed vCPU, median host",
        0,
        [INFO_A, samples(m.HOST_VCPUS, still(0), **ARMED), samples(m.HOST_NOTIFY_WINDOW_EXITS, still(0))],
    ),
    Case(
        "agents down or blind, and why",
        FLEET,
        "Agents down or blind",
        0,
        [
            *BLIND,
            samples(m.HOST_INFO, still(1), "well"),
            samples(m.HOST_NO_PROGRESS, still(0), "well"),
            samples(m.COMPLETE, still(1), "well"),
            samples(AGENT_SCRAPED, still(1), "well"),
            samples(UP, still(1), "well"),
        ],
        {
            _blind("KvmNotifyExporterDown", "down", "dead", "does not answer"): 0,
            _blind("KvmNotifyExporterDown", "down", "lost", "no target now"): 0,
            _blind("KvmNotifyAgentBlind", "blind", "partial", "pid_namespace"): 1,
            _blind("KvmNotifyAgentBlind", "blind", "untold", ""): 0,
            _blind("KvmNotifyVmsLeftOut", "blind", "crowded", "over_budget"): 1,
            _blind("KvmNotifyVmsLeftOut", "blind", "both", "owners_pending"): 1,
            _blind("KvmNotifyAgentBlind", "blind", "both", "no_source"): 1,
            _blind("KvmNotifyStallsNotDetected", "blind", "locked", "no RIPs: kernel lockdown"): 1,
            _blind("KvmNotifyStallsNotDetected", "blind", "untraced", "no RIPs"): 1,
        },
    ),
    # An alert that no host of now is about has no row of its own.
    Case(
        "since when agents are down or blind",
        FLEET,
        "Agents down or blind",
        1,
        [
            *BLIND,
            samples(ALERT_ACTIVE_SINCE, still(60), "dead", alertname="KvmNotifyExporterDown"),
            samples(ALERT_ACTIVE_SINCE, still(90), "partial", alertname="KvmNotifyAgentBlind"),
            samples(ALERT_ACTIVE_SINCE, still(80), "crowded", alertname="KvmNotifyVmsLeftOut"),
            samples(ALERT_ACTIVE_SINCE, still(30), "partial", alertname="KvmNotifyExporterDown"),
            samples(ALERT_ACTIVE_SINCE, still(30), "dead", alertname="KvmNotifySourceLost"),
        ],
        {
            '{alertname="KvmNotifyExporterDown", instance="dead", job="kvm"}': 60_000,
            '{alertname="KvmNotifyAgentBlind", instance="partial", job="kvm"}': 90_000,
            '{alertname="KvmNotifyVmsLeftOut", instance="crowded", job="kvm"}': 80_000,
        },
    ),
    # The time range is an hour, and there are ten minutes of history.
    # Of three hosts, one takes none, and on one a guest floods.
    Case(
        "exits a day with a short history",
        FLEET,
        "Groups of hosts",
        5,
        [
            *(samples(m.HOST_INFO, still(1), host, **CPU) for host in "abc"),
            *(samples(HOST_ARMED_VCPUS, "_x29 4x10", host) for host in "abc"),
            samples(HOST_EXIT_RATE, "_x29 0.5x10"),
            samples(HOST_EXIT_RATE, "_x29 0x10", "b"),
            samples(HOST_EXIT_RATE, "_x29 9000x10", "c"),
        ],
        {CPU_SERIES: 10_800},
    ),
    # Three minutes with 2 exits a second, then none: the rule records no 0.
    Case(
        "top VMs by name",
        FLEET,
        "Top VMs",
        0,
        [NAMED, samples(VM_EXIT_RATE, "_x36 2 2 2", vm=GUEST), samples(VM_EXIT_RATE, "_x36 1", "b", vm=GUEST)],
        {
            f'{{instance="a", job="kvm", vm="{GUEST}", who="web-1", owner="shop"}}': 360,
            f'{{instance="b", job="kvm", vm="{GUEST}", who="{GUEST}"}}': 60,
        },
    ),
    Case(
        "stalled vCPUs, of VMs with and without name",
        FLEET,
        "Stalled now",
        0,
        [
            NAMED,
            samples(m.VCPU_NO_PROGRESS, still(1), **VCPU),
            samples(m.VCPU_NO_PROGRESS, still(1), "b", **VCPU),
            samples(m.VCPU_NO_PROGRESS, still(0), "c", **VCPU),
        ],
        {
            f'{{instance="a", job="kvm", vcpu="1", vm="{GUEST}", who="web-1", owner="shop"}}': 1,
            f'{{instance="b", job="kvm", vcpu="1", vm="{GUEST}", who="{GUEST}"}}': 1,
        },
    ),
    Case(
        "stalled vCPUs of a host",
        HOST,
        "Stalled now",
        0,
        [
            samples(m.VCPU_NO_PROGRESS, still(1), **VCPU),
            samples(m.VCPU_NO_PROGRESS, still(0), vm=GUEST, vcpu="2"),
            samples(m.VM_INFO, still(1), vm=GUEST, name="i-4711", display_name="web", vm_namespace="team"),
        ],
        {f'{{instance="a", job="kvm", vcpu="1", vm="{GUEST}", who="web", owner="team"}}': 1},
    ),
    Case(
        "a host comes back with another microcode",
        HOST,
        "annotation Microcode or kernel changed",
        0,
        [
            samples(m.HOST_INFO, "1x34 stale", kernel="6.12", **CPU),
            samples(m.HOST_INFO, "_x37 1x5", kernel="6.12", **CPU | {"microcode": "0x99"}),
            samples(m.HOST_INFO, still(1), "same", kernel="6.12", **CPU),
            samples(m.HOST_INFO, "_x37 1x5", "new", kernel="6.12", **CPU),
        ],
        {'{instance="a", kernel="6.12", microcode="0x99"}': 1},
    ),
    Case(
        "a choice of VMs, by name and by 8 digits of a UUID",
        VM,
        "variable vm",
        0,
        [
            samples(m.VM_INFO, still(1), vm=GUEST, name="web", project="shop"),
            samples(m.VM_INFO, still(1), vm=f"{GUEST}-4711", name="web", project="shop"),
            samples(m.VM_INFO, still(1), vm="qemu-17613"),
        ],
        {
            f'{{label=" web shop  5107a7ed", vm="{GUEST}"}}': 1,
            f'{{label=" web shop  5107a7ed-4711", vm="{GUEST}-4711"}}': 1,
            '{label="    qemu-17613", vm="qemu-17613"}': 1,
        },
    ),
    # One guest floods on b; three hosts with another microcode take a few exits each.
    *(
        Case(
            f"groups by {name} with exits",
            FLEET,
            "Groups of hosts",
            number,
            [
                *(samples(m.HOST_INFO, still(1), host, **CPU) for host in "acd"),
                *(samples(m.HOST_NOTIFY_WINDOW_EXITS, "0x30 1 1x20", host) for host in "acd"),
                *(samples(VM_EXIT_RATE, "_x30 0.01x5", host, vm=vm) for host in "acd" for vm in ("1", "2")),
                samples(m.HOST_INFO, still(1), "b", **CPU | {"microcode": "0x99"}),
                samples(m.HOST_NOTIFY_WINDOW_EXITS, by_second(9000), "b"),
                samples(VM_EXIT_RATE, still(9000), "b", vm="1"),
                samples(m.HOST_INFO, still(1), "well", **CPU | {"microcode": "0x11"}),
                samples(m.HOST_NOTIFY_WINDOW_EXITS, still(0), "well"),
            ],
            wanted,
        )
        for name, number, wanted in (
            ("hosts", 1, {CPU_SERIES: 3, FLOODED_SERIES: 1, CPU_SERIES.replace("0x2b", "0x11"): 0}),
            ("VMs", 2, {CPU_SERIES: 6, FLOODED_SERIES: 1}),
        )
    ),
    # One exit in five minutes.
    Case(
        "exits an hour by name",
        FLEET,
        "Notify exits of the top VMs",
        0,
        [
            samples(VM_EXIT_RATE, still(1 / 300), vm=GUEST),
            samples(VM_NOTIFIED, still(1), vm=GUEST, name="i-1", display_name="web"),
            samples(VM_EXIT_RATE, still(1 / 300), "b", vm=GUEST),
        ],
        {
            f'{{instance="a", job="kvm", vm="{GUEST}", who="web"}}': 12,
            f'{{instance="b", job="kvm", vm="{GUEST}", who="{GUEST}"}}': 12,
        },
    ),
    Case(
        "since when a vCPU is stalled, in milliseconds",
        FLEET,
        "Stalled now",
        1,
        [samples(m.VCPU_STALL_START, still(1200), **VCPU)],
        {OF_VCPU: 1_200_000},
    ),
    Case(
        "for how long a vCPU is stalled",
        HOST,
        "Stalled now",
        2,
        [samples(m.VCPU_STALL_START, still(1200), **VCPU)],
        {OF_VCPU: 1200},
    ),
    Case(
        "exits of VMs with stalled vCPUs, and of no other",
        FLEET,
        "Stalled now",
        3,
        [
            samples(m.VCPU_NO_PROGRESS, still(1), **VCPU),
            samples(VM_EXIT_RATE, still(9000), vm=GUEST),
            samples(VM_EXIT_RATE, still(5), "b", vm=GUEST),
        ],
        {OF_VCPU: 9000},
    ),
    Case(
        "alerts that fire, on hosts and on a fleet",
        FLEET,
        "Firing alerts",
        0,
        [
            samples(ALERTS, still(1), alertname="KvmNotifyExporterDown", severity="ticket", alertstate="firing"),
            samples(ALERT_ACTIVE_SINCE, still(60), alertname="KvmNotifyExporterDown", severity="ticket"),
            samples(ALERTS, still(1), alertname="KvmVmUnprotected", severity="ticket", alertstate="pending"),
            samples(ALERT_ACTIVE_SINCE, still(60), alertname="KvmVmUnprotected", severity="ticket"),
            samples(ALERTS, still(1), alertname="NodeDown", severity="page", alertstate="firing"),
            samples(ALERT_ACTIVE_SINCE, still(60), alertname="NodeDown", severity="page"),
            samples(ALERTS, still(1), "", "", alertname="KvmMicrocodeX", alertstate="firing", microcode="0x2b"),
            samples(ALERT_ACTIVE_SINCE, still(90), "", "", alertname="KvmMicrocodeX", microcode="0x2b"),
        ],
        {
            '{alertname="KvmNotifyExporterDown", instance="a", job="kvm", severity="ticket", where="a", '
            'host_board="kvm-notify-host", vm_board="kvm-notify-host"}': 60_000,
            '{alertname="KvmMicrocodeX", microcode="0x2b", instance="All", job="All", where="(many hosts)", '
            'host_board="kvm-notify-fleet", vm_board="kvm-notify-fleet"}': 90_000,
        },
    ),
    Case(
        "guest time lost",
        FLEET,
        "Guest time lost",
        0,
        [samples(HOST_SECONDS_LOST, still(0.5)), samples(HOST_SECONDS_LOST, still(0), "b")],
        {'{instance="a", job="kvm"}': 0.5},
    ),
    # A table of now: no row of what was there in the time range and is gone.
    Case(
        "exits of VMs that are there",
        HOST,
        "VMs",
        6,
        [
            NAMED,
            samples(m.VM_NOTIFY_WINDOW_EXITS, by_second(0), vm=GUEST),
            samples(m.VM_NOTIFY_WINDOW_EXITS, "0x30 stale", vm="ended"),
            samples(m.VM_INFO, "1x30 stale", vm="ended"),
        ],
        {OF_VM: 0},
    ),
    Case(
        "exits of hosts that are there",
        FLEET,
        "Hosts",
        5,  # a number has the same title as the table
        [
            INFO_A,
            samples(m.HOST_NOTIFY_WINDOW_EXITS, by_second(0)),
            samples(m.HOST_INFO, "1x30 stale", "gone", **CPU),
            samples(m.HOST_NOTIFY_WINDOW_EXITS, "0x30 stale", "gone"),
        ],
        {'{instance="a", job="kvm"}': 0},
    ),
    Case(
        "problem: errors of agents that are there",
        FLEET,
        PROBLEMS,
        3,
        [
            samples(m.READ_ERRORS, "0x30 9 stale", "gone", source="bpf", kind="malformed"),
            samples(m.BUILD_INFO, "1x30 stale", "gone"),
        ],
    ),
    # None is 0 where there are hosts, and not known where there are not.
    Case(
        "a host that cannot see stalls",
        FLEET,
        "Blind to stalls",
        0,
        [INFO_A, INFO_B, samples(m.HOST_NO_PROGRESS, still(0))],
        {"{}": 1},
    ),
    Case(
        "all hosts see stalls",
        FLEET,
        "Blind to stalls",
        0,
        [INFO_A, samples(m.HOST_NO_PROGRESS, still(0))],
        {"{}": 0},
    ),
    Case(
        "a host whose agent does not see every VM",
        FLEET,
        "Blind to stalls",
        0,
        [INFO_A, samples(m.HOST_NO_PROGRESS, still(0)), samples(m.COMPLETE, still(0))],
        {"{}": 1},
    ),
    *(
        Case(
            f"{stalled} stalled, of those that are seen",
            HOST,
            "Stalled vCPUs",
            0,
            [samples(m.HOST_NO_PROGRESS, still(stalled)), samples(m.COMPLETE, still(0))],
            wanted,
        )
        for stalled, wanted in ((0, {}), (2, {"{}": 2.0}))
    ),
    Case("no hosts", FLEET, "Blind to stalls", 0, [samples(m.HOST_NO_PROGRESS, still(0))]),
    Case("hosts", FLEET, "Hosts", 0, [INFO_A, INFO_B], {"{}": 2}),
    Case(
        "problem: no source",
        FLEET,
        PROBLEMS,
        1,
        [
            samples(m.SOURCE_UP, still(0), source="bpf"),
            samples(m.SOURCE_UP, still(0), "b", source="bpf"),
            samples(m.SOURCE_UP, still(1), "b", source="stats_fd"),
        ],
        {'{instance="a", job="kvm"}': 1},
    ),
    Case(
        "problem: a collector fails",
        FLEET,
        PROBLEMS,
        4,
        [
            samples(m.SCRAPE_SUCCESS, still(0), collector="vm"),
            samples(m.SCRAPE_SUCCESS, still(1), collector="vcpu"),
            samples(m.SCRAPE_SUCCESS, still(1), collector="host"),
        ],
        {'{instance="a", job="kvm"}': 1},
    ),
    Case(
        "all VMs are read", HOST, "VMs not read", 0, [NAMED, samples(m.VM_SOURCE_INFO, still(1), vm=GUEST)], {"{}": 0}
    ),
    Case("a VM is not read", HOST, "VMs not read", 0, [NAMED], {"{}": 1}),
    Case("names of VMs are not kept", HOST, "VMs not read", 0, [INFO_A]),
)


JOB: Final = {"job": "kvm-notify-exporter"}
WELL, DEAD = samples(UP, still(1), **JOB), samples(UP, still(0), "dead", **JOB)
PRINTER: Final = samples(UP, still(0), "printer", job="printers")
LOST: Final = (samples(m.HOST_VMS, "3x10 stale", "lost", **ARMED), samples(UP, "1x10 stale", "lost"))
# What the recording rules make of what is scraped. No agent that is down has been up in the time range.
RECORDED_CASES: Final = (
    Case("agents are down", FLEET, "Agents down", 0, [WELL, DEAD, PRINTER, *LOST], {"{}": 2}),
    Case("no agent is down", FLEET, "Agents down", 0, [WELL, PRINTER], {"{}": 0}),
    Case("up is not kept", FLEET, "Agents down", 0, [INFO_A, PRINTER]),
    Case(
        "problem: down",
        FLEET,
        PROBLEMS,
        0,
        [WELL, DEAD, PRINTER, *LOST],
        {'{instance="dead", job="kvm-notify-exporter"}': 1, '{instance="lost", job="kvm"}': 1},
    ),
)


@pytest.mark.parametrize(("cases", "rules"), [(CASES, []), (RECORDED_CASES, [RECORDING])], ids=["plain", "recorded"])
def test_values_are_what_samples_say(
    cases: Sequence[Case], rules: list[Path], tmp_path: Path, tell: Callable[[str], None]
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    path = tmp_path / "values.test.yml"
    tests = {"evaluation_interval": "1m", "tests": [case.render() for case in cases]}
    path.write_text(yaml.safe_dump(tests | {"rule_files": [str(file) for file in rules]}))
    run = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    tell(f"{len(cases)} answers of {len({(c.dashboard, c.place, c.number) for c in cases})} queries, by promtool")


def test_agents_down_and_the_alert_count_the_same() -> None:
    (alert,) = (rule for rule in read_rules(ALERT_RULES) if rule.get("alert") == "KvmNotifyExporterDown")
    for expr in (alert["expr"], find_expr(FLEET, "Agents down"), find_expr(FLEET, PROBLEMS)):
        assert {selector.metric for selector in find_selectors(expr)} == {AGENT_SCRAPED.name}


def read_rules(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
