"""Two days of simulated history, for rules that no test can wait for and for faults that no agent here can have.

`history_writer` writes ``SERIES`` into the data of a Prometheus. The instances:

============== ===================================================================================================
``fleet-1``... three hosts with a new microcode for 20 hours, since when guests take notify exits; on ``fleet-1`` one
               guest is stalled and takes many more since half an hour
``untraced``   has vCPUs with notify exits armed and no way to trace them
``faulty``     an invalid VM context, a source that was lost, lost records, too many looks, a collector that fails
``hidden``     an agent that does not see every process
``crowded``    a user has more VMs than are shown of one
``changed``    a host that has come back with another microcode within the last minute
``gone``       an agent that is not scraped for half an hour
``lost``       a host that is no target any more, and had VMs
============== ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from exporter.prometheus import metrics as m
from grafana.builder.queries import ALERT_ACTIVE_SINCE, ALERTS, UP
from kvm.model import Protection
from tests.live.history_writer import ByHour, Sampling, Series, always, between, count_from, write_history

# The last hour is sampled more often, for the dashboards' short rates.
SAMPLING = Sampling(hours=50.0, last_seconds=3600)
NEW_MICROCODE_HOURS = -20.0
RISE_HOURS = -0.5
CHANGE_HOURS = -0.5 / 60
REBOOT_HOURS = 0.2  # a sample is found for 5 minutes, and so is what is recorded of it: the two are never seen together
# The VM that the dashboards' queries are about: the demo's that gets stuck.
VM = "5107a7ed-0000-4000-8000-000000000002"
CPU = {"cpu_vendor": "GenuineIntel", "cpu_family": "6", "cpu_model": "143", "cpu_stepping": "8"}
MICROCODES = ("0x2b000643", "0x2b000661")


def _make_vm(instance: str, vm: str, name: str) -> Iterator[Series]:
    info = dict.fromkeys(m.VM_INFO.labels, "")
    info |= {"vm": vm, "uuid": vm, "name": name, "project": "research", "vmm": "qemu", "pid": "5000"}
    yield Series(m.VM_INFO, instance, always(1), info)
    yield Series(m.VM_NOTIFY_WINDOW, instance, always(128_000), {"vm": vm})
    claims = {"vm": vm, "display_name": "", "project": "somebody-else", "vm_namespace": "kube-system"}
    yield Series(m.VM_CLAIMED_INFO, instance, always(1), claims)


def _make_host(instance: str, armed_vcpus: int) -> Iterator[Series]:
    for microcode, since, until in zip(
        MICROCODES, (-SAMPLING.hours, NEW_MICROCODE_HOURS), (NEW_MICROCODE_HOURS, 1.0), strict=True
    ):
        info = {**dict.fromkeys(m.HOST_INFO.labels, ""), **CPU, "microcode": microcode}
        yield Series(m.HOST_INFO, instance, between(since, until), info)
    yield Series(UP, instance, always(1), {})
    yield Series(m.BUILD_INFO, instance, always(1), dict.fromkeys(m.BUILD_INFO.labels, ""))
    yield Series(m.HOST_NOTIFY_SUPPORTED, instance, always(1), {})
    yield Series(m.POLL_PERIOD, instance, always(1), {})
    for state in Protection:
        vcpus = armed_vcpus if state is Protection.ARMED else 0
        yield Series(m.HOST_VCPUS, instance, always(vcpus), {"protection": state})
        yield Series(m.HOST_VMS, instance, always(vcpus and 2), {"protection": state})


def _make_fleet_host(instance: str, rise: float) -> Iterator[Series]:
    yield from _make_host(instance, 64)
    yield Series(m.HOST_NO_PROGRESS, instance, lambda hour: float(rise > 0 and hour >= RISE_HOURS), {})
    yield Series(m.HOST_NOTIFY_WINDOW_EXITS, instance, count_from(NEW_MICROCODE_HOURS, 360), {})
    yield Series(m.HOST_INTERVAL_MIN, instance, always(0.0001), {"window_cycles": "128000"})
    for number in (1, 2):
        vm = f"5107a7ed-0000-4000-8000-00000000010{number}"
        yield from _make_vm(instance, vm, f"guest-{number}")
        yield Series(m.VM_SOURCE_INFO, instance, always(1), {"vm": vm, "source": "bpf"})
        before, since = count_from(NEW_MICROCODE_HOURS, 180), count_from(RISE_HOURS, rise if number == 1 else 0)
        yield Series(m.VM_NOTIFY_WINDOW_EXITS, instance, _add(before, since), {"vm": vm})
        if number == 1 and rise:
            yield Series(m.VCPU_NO_PROGRESS, instance, between(RISE_HOURS, 1.0), {"vm": vm, "vcpu": "0"})


def _make_changed_host(instance: str) -> Iterator[Series]:
    info = {**dict.fromkeys(m.HOST_INFO.labels, ""), **CPU}
    for microcode, since, until in zip(
        MICROCODES, (-SAMPLING.hours, CHANGE_HOURS), (CHANGE_HOURS - REBOOT_HOURS, 1.0), strict=True
    ):
        yield Series(m.HOST_INFO, instance, between(since, until), {**info, "microcode": microcode})


def _make_alert(instance: str, name: str) -> Iterator[Series]:
    """An alert that fires, as the Prometheus that evaluates it keeps it; about a whole fleet where there is no host."""
    labels = dict.fromkeys(ALERT_ACTIVE_SINCE.labels, "") | {"alertname": name, "severity": "ticket"}
    yield Series(ALERTS, instance, always(1), {**labels, "alertstate": "firing"})
    yield Series(ALERT_ACTIVE_SINCE, instance, always(1_700_000_000.0), labels)


def _add(one: ByHour, other: ByHour) -> ByHour:
    return lambda hour: (one(hour) or 0) + (other(hour) or 0)


def _make_faulty_host(instance: str) -> Iterator[Series]:
    yield Series(m.SNAPSHOT_TIMESTAMP, instance, always(1_700_000_000.0), {})
    yield from _make_host(instance, 4)
    yield Series(m.HOST_NO_PROGRESS, instance, always(0), {})
    yield from _make_vm(instance, VM, "batch-1")
    invalid = m.VCPU_CONTEXT_INVALID
    yield Series(invalid, instance, count_from(-2.0, 10), {"vm": VM, "vcpu": "0"})
    yield Series(invalid, instance, between(-0.5, 1.0), {"vm": VM, "vcpu": "1"})  # born at 1
    yield Series(m.SOURCE_UP, instance, lambda hour: float(hour < RISE_HOURS), {"source": "bpf"})
    yield Series(m.SOURCE_UP, instance, always(1), {"source": "stats_fd"})
    for source, since, until in (("bpf", -SAMPLING.hours, RISE_HOURS), ("stats_fd", RISE_HOURS, 1.0)):
        yield Series(m.VM_SOURCE_INFO, instance, between(since, until), {"vm": VM, "source": source})
    yield Series(m.TRACE_LOST_RECORDS, instance, count_from(-1.0, 600), {})
    yield Series(m.TRACE_BUDGET_EXHAUSTED, instance, count_from(-1.0, 6000), {})
    yield Series(m.SCRAPE_SUCCESS, instance, always(0), {"collector": "vcpu"})
    yield Series(m.STATISTICS_LEFT_OUT, instance, always(2), {"reason": "unknown_type"})
    yield Series(m.READ_ERRORS, instance, count_from(-1.0, 60), {"source": "stats_fd", "kind": "malformed"})


def _make_incomplete(instance: str, reason: str) -> Iterator[Series]:
    yield Series(UP, instance, always(1), {})
    yield Series(m.COMPLETE, instance, always(0), {})
    yield Series(m.INCOMPLETE_REASON, instance, always(1), {"reason": reason})


SERIES: tuple[Series, ...] = (
    *_make_fleet_host("fleet-1:9750", 3600),
    *_make_fleet_host("fleet-2:9750", 0),
    *_make_fleet_host("fleet-3:9750", 0),
    *_make_host("untraced:9750", 8),
    *_make_faulty_host("faulty:9750"),
    *_make_incomplete("hidden:9750", "hidden_processes"),
    *_make_incomplete("crowded:9750", "over_budget"),
    *_make_changed_host("changed:9750"),
    *_make_alert("", "KvmMicrocodeNotifyExits"),
    *_make_alert("fleet-1:9750", "KvmMicrocodeUpdateNotifyExits"),
    *_make_alert("gone:9750", "KvmNotifyExporterDown"),
    Series(UP, "gone:9750", lambda hour: float(hour < RISE_HOURS), {}),
    Series(m.VM_NOTIFY_PROTECTION, "crowded:9750", always(1), {"vm": VM, "state": Protection.ARMED}),
    Series(m.COMPLETE, "lost:9750", lambda hour: 0 if hour < RISE_HOURS else None, {}),
    Series(m.HOST_VMS, "lost:9750", lambda hour: 2 if hour < RISE_HOURS else None, {"protection": Protection.ARMED}),
)


def write_simulated_history(directory: Path, rule_files: Sequence[Path], end: float) -> int:
    """Fill ``directory/data`` with the table and with what recording rules make of it; returns how many they are."""
    return write_history(directory, rule_files, end, SERIES, SAMPLING)
