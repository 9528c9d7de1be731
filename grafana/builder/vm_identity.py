"""The rows of a VM's dashboard about who it is."""

from __future__ import annotations

from typing import Final

from exporter.prometheus import metrics as m
from grafana.builder.colors import GREEN_UNTIL_ONE, PROTECTION, PROTECTION_COLORS
from grafana.builder.layout import (
    Row,
    link_to_host,
)
from grafana.builder.panels import COUNT, Query, make_stat
from grafana.builder.queries import (
    VM_KEYS,
    call_by_name,
    increase,
    select,
    vm_seconds_lost,
)
from grafana.builder.tables import JOB, Column, hide, make_table

VM: Final = "$vm"


def make_who_row() -> Row:
    """Return the row about what a VM is called, where it is, and how it fares."""
    return Row(
        1,
        "VM ${vm:text}",
        [
            make_table(
                2,
                "Who it is",
                "Names and owner as the VMM's command line and the host's files tell, and where its counts come from.",
                {
                    "named": call_by_name(select(m.VM_INFO, vm=VM), f"{VM_KEYS}, name, display_name, vmm"),
                    "read_by": f"max by ({VM_KEYS}, source) ({select(m.VM_SOURCE_INFO, vm=VM)})",
                    "state_info": f"max by ({VM_KEYS}, state) ({select(m.VM_NOTIFY_PROTECTION, vm=VM)} == 1)",
                    "started": f"max by ({VM_KEYS}) ({select(m.VM_START_TIME, vm=VM)}) * 1000",
                },
                [
                    Column(field="name", title="Name", width=160, grows=True),
                    Column(field="display_name", title="User's name", width=140),
                    Column(field="owner", title="Owner", width=130),
                    Column(field="instance", title="Host", width=220, links=[link_to_host()]),
                    Column(field="state", title="Protection", width=110, mappings=PROTECTION),
                    Column(field="source", title="Source", width=80),
                    Column(field="vmm", title="VMM", width=120),
                    Column(field="started", title="Started", width=160, unit="dateTimeAsIso"),
                    JOB,
                    hide("vm"),
                    hide("who"),
                ],
                sort_by=["Started"],
                rows=1,
                no_value="no such VM now",
            ),
            make_stat(
                3,
                "Protection",
                "armed: notify exits are on. off: the host could, the VMM did not ask. unsupported: the host cannot. "
                "unknown: it could not be found out. Only where it is armed does a count of 0 mean that nothing "
                "happened.",
                Query(f"max by (state) ({select(m.VM_NOTIFY_PROTECTION, vm=VM)} == 1)", "{{state}}"),
                name_colors=PROTECTION_COLORS,
            ),
            make_stat(
                4,
                "Window",
                "KVM's notify_window, in crystal clock cycles, to which the CPU adds a threshold of its own: 0 is "
                "usual. Only where known and armed.",
                Query(f"max({select(m.VM_NOTIFY_WINDOW, vm=VM)})"),
                unit="locale",
            ),
            make_stat(5, "vCPUs", "Number of vCPUs.", Query(f"max({select(m.VM_VCPUS, vm=VM)})")),
            make_stat(
                6,
                "Stalled vCPUs",
                "vCPUs that are stuck at one RIP now. Not known before the first notify exit, or where RIPs cannot be "
                "had.",
                Query(f"sum({select(m.VCPU_NO_PROGRESS, vm=VM)})"),
                thresholds=GREEN_UNTIL_ONE,
            ),
            make_stat(
                7,
                "Notify exits",
                "Notify VM exits in the time range, all vCPUs together.",
                Query(f"sum({increase(m.VM_NOTIFY_WINDOW_EXITS, vm=VM)})"),
                unit=COUNT,
                decimals=0,
            ),
            make_stat(
                8,
                "Guest time lost",
                "Notify exits in the time range times the shortest interval between two of them with this VM's window.",
                Query(f"sum({vm_seconds_lost(increase(m.VM_NOTIFY_WINDOW_EXITS, vm=VM), vm=VM)})"),
                unit="s",
            ),
        ],
        repeat="vm",
    )


def _select_claims() -> str:
    """What the VM's own user says, under names of its own: it must not be taken for the owner."""
    claims = select(m.VM_CLAIMED_INFO, vm=VM)
    for label in ("project", "vm_namespace"):
        claims = f'label_replace({claims}, "claimed_{label}", "$1", "{label}", "(.*)")'
    return f"max by ({VM_KEYS}, claimed_project, claimed_vm_namespace) ({claims})"


def make_identity_row() -> Row:
    """Return the row about what a VM's names rest on."""
    return Row(
        40,
        "Identity of ${vm:text}",
        [
            make_table(
                41,
                "What its identity rests on",
                "Who vouches for the VM's names and owner; and what only its own user claims, which may be another's "
                "name.",
                {
                    "who": f"max by ({VM_KEYS}, uuid, identity, pid) ({select(m.VM_INFO, vm=VM)})",
                    "claims": _select_claims(),
                },
                [
                    Column(field="vm", title="VM's id", width=300, grows=True),
                    Column(field="uuid", title="UUID", width=300),
                    Column(field="identity", title="Vouched by", width=120),
                    Column(field="pid", title="PID", width=90),
                    Column(field="claimed_project", title="Claimed project", width=160),
                    Column(field="claimed_vm_namespace", title="Claimed namespace", width=168),
                    hide("instance"),
                    JOB,
                ],
                sort_by=["PID"],
                rows=1,
                no_value="no such VM now",
            ),
        ],
        collapsed=True,
        repeat="vm",
    )
