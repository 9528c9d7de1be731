"""The tables that the first screen is for: who is stalled now and whose it is, and which alerts fire."""

from __future__ import annotations

from typing import Final

from exporter.prometheus import metrics as m
from exporter.prometheus.metrics import Metric
from grafana.builder.colors import SEVERITY, STALLED_FOR
from grafana.builder.layout import Panel, link_to_host, link_to_vm
from grafana.builder.queries import (
    ALERT_ACTIVE_SINCE,
    ALERTS,
    VM_KEYS,
    call_by_name,
    find_stalled,
    lead_to_what_is_known,
    name_stalled,
    select,
)
from grafana.builder.tables import JOB, Column, count_of, hide, make_table

VCPU_KEYS: Final = f"{VM_KEYS}, vcpu"
ALERT_KEYS: Final = f"{VM_KEYS}, alertname, severity, microcode"
# Of the job and instance that were chosen, and those about a whole fleet, which have neither.
SCOPES: Final = ('job=~"$job", instance=~"$instance"', 'job="", instance=""')


def make_stalled_table(number: int, vm_exit_rate: str, *info: Metric) -> Panel:
    """Return the table of stalled vCPUs; ``vm_exit_rate`` is a query by VM, ``info`` has names and owners."""
    start = f"max by ({VCPU_KEYS}) ({select(m.VCPU_STALL_START)})"
    return make_table(
        number,
        "Stalled now",
        "Each vCPU that makes no forward progress, whose VM it is (where kvm_vm_info is kept), since when, and how "
        "many notify exits its VM takes. The RIP is in the agent's log and API.",
        {
            "stalled": name_stalled(*info),
            "since": f"{start} * 1000",
            "lasted": f"time() - {start}",
            "rate": f"0 * ({find_stalled()}) + on ({VM_KEYS}) group_left () sum by ({VM_KEYS}) ({vm_exit_rate})",
        },
        [
            Column(field="who", title="VM", width=220, links=[link_to_vm()]),
            Column(field="owner", title="Owner", width=130),
            Column(field="vcpu", title="vCPU", width=64),
            Column(field="lasted", title="Stalled for", width=120, unit="s", thresholds=STALLED_FOR),
            Column(field="since", title="Since", width=150, unit="dateTimeAsIsoNoDateIfToday"),
            count_of("rate", "Exits/s of VM", 130),
            Column(field="instance", title="Host", width=240, links=[link_to_host()]),
            Column(field="vm", title="VM's id", width=150, grows=True, links=[link_to_vm()]),
            JOB,
        ],
        sort_by=["Stalled for"],
        rows=3,
        no_value="no vCPU is known to be stalled",
    )


def make_alerts_table(number: int) -> Panel:
    """Return the table of alerts that fire, by host; Prometheus keeps them as series."""
    firing = " or ".join(
        f'{ALERT_ACTIVE_SINCE.name}{{alertname=~"Kvm.*", {scope}}} * 1000 and ignoring (alertstate) '
        f'{ALERTS.name}{{alertname=~"Kvm.*", alertstate="firing", {scope}}}'
        for scope in SCOPES
    )
    to_host = link_to_host(uid="${__data.fields.host_board}")
    to_vm = link_to_vm(uid="${__data.fields.vm_board}")
    return make_table(
        number,
        "Firing alerts",
        "Alerts of these rules that fire now, and since when they have had a reason. The runbook says what to do.",
        {"since": lead_to_what_is_known(call_by_name(firing, ALERT_KEYS))},
        [
            Column(field="severity", title="Severity", width=90, mappings=SEVERITY),
            Column(field="alertname", title="Alert", width=250),
            Column(field="where", title="Host", width=240, links=[to_host]),
            Column(field="who", title="VM", width=160, grows=True, links=[to_vm]),
            Column(field="owner", title="Owner", width=130),
            Column(field="microcode", title="Microcode", width=110),
            Column(field="since", title="Since", width=140, unit="dateTimeFromNow"),
            *(hide(field) for field in ("vm", "instance", "host_board", "vm_board")),
            JOB,
        ],
        sort_by=["Severity", "Host"],
        ascending=True,
        rows=3,
        no_value="no firing alert is known",
    )
