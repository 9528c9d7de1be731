"""Explains to a person what works on this host, what does not, why, and what to do about it.

``render_check`` is pure: it turns a snapshot into lines. The verdict, and the exit code, is whether the
counters can be had.
"""

from __future__ import annotations

from collections import Counter

from kvm.host.privileges import NEEDED_CAPABILITIES, Feature, Privileges
from kvm.model import Host, Protection, Snapshot, SourceReport

SOURCE_USES = {
    "bpf": "every vCPU of every VMM, and whether notify exits are armed",
    "stats_fd": "every vCPU of VMMs that hold stats fds (QEMU 8.1 and later)",
    "debugfs": "each VM's sum, no vCPUs",
}
# For a source without a remedy.
NOTHING_TO_DO = "nothing to do"


def has_counters(snapshot: Snapshot) -> bool:
    """Tell whether a source works and, where there are VMs, some of them could be read."""
    unread = sum(not reading.source for reading in snapshot.readings)
    return any(source.up for source in snapshot.sources) and (not unread or unread < len(snapshot.readings))


def can_read(snapshot: Snapshot) -> bool:
    """Tell whether this host's counters can be had: there are some, and no VM can have been overlooked."""
    return snapshot.complete and has_counters(snapshot)


def render_check(
    snapshot: Snapshot, privileges: Privileges, vmx_flags: frozenset[str] | None, tracing: str, *, series: str
) -> str:
    """Render a report: a line a fact, sources in order of preference.

    ``tracing`` says whether exits can be traced, ``series`` how many series there are.
    """
    host = snapshot.host
    rows = [
        ("host", f"Linux {host.kernel}, {describe_cpu(host)}"),
        ("kvm", describe_kvm(host)),
        ("notify exits", _describe_notify(host, vmx_flags)),
        ("lockdown", describe_lockdown(host)),
        ("privileges", _describe_privileges(privileges)),
        *((f"for {feature.name}", _describe_need(feature, privileges)) for feature in privileges.find_features()),
        ("namespaces", _describe_namespaces(host, privileges)),
        ("security", _describe_security(privileges)),
        *((f"source {source.source}", _describe_source(source)) for source in snapshot.sources),
        ("stalls", tracing),
        ("VMs", _describe_vms(snapshot)),
        ("series", series),
        ("complete", describe_blind_spots(snapshot) or "every VM of this host is seen"),
        ("verdict", _describe_verdict(snapshot)),
    ]
    width = max(len(name) for name, _text in rows)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows)


def describe_blind_spots(snapshot: Snapshot) -> str:
    """Say why VMs of this host may be missing, "" where none can be."""
    return "; ".join(spot.text for spot in snapshot.blind_spots)


def describe_blindness(snapshot: Snapshot) -> str:
    """Say why nothing of this host can be seen, "" where something can be."""
    if not snapshot.is_blind:
        return ""
    return describe_blind_spots(snapshot) or _describe_verdict(snapshot)


def describe_cpu(host: Host) -> str:
    """Say which CPU it is, down to its microcode."""
    if host.cpu_unknown_reason:
        return f"CPU unknown: {host.cpu_unknown_reason}"
    numbers = f"family {host.cpu_family} model {host.cpu_model} stepping {host.cpu_stepping}"
    return f"{host.cpu_model_name or 'CPU'} ({host.cpu_vendor} {numbers}, microcode {host.microcode or 'unknown'})"


def describe_kvm(host: Host) -> str:
    """Say whether KVM answers, and what it runs on."""
    backends = {
        "kvm_intel": "VMX, by kvm_intel",
        "kvm_amd": "SVM, by kvm_amd",
        "kvm_pvm": "kvm_pvm: KVM in software, without VMX or SVM",
        "kvm": "a back end of no known name",
    }
    if host.notify_supported is None:
        return host.notify_unknown_reason
    return f"/dev/kvm answers; {backends.get(host.kvm_module, 'no module of it is shown')}"


def _describe_notify(host: Host, vmx_flags: frozenset[str] | None) -> str:
    if host.notify_supported is None:
        return "unknown: KVM cannot be asked"
    if host.notify_supported:
        return "supported (KVM_CAP_X86_NOTIFY_VMEXIT); whether a VM has them armed is its VMM's choice"
    if host.cpu_unknown_reason:
        why = "why is not known, as /proc/cpuinfo cannot be read"
    elif vmx_flags is None:
        why = "the CPU shows no VMX"
    elif "notify_vm_exiting" in vmx_flags:
        why = (
            "though the CPU has notify_vm_exiting: KVM is too old (before Linux 6.0) or runs inside another hypervisor"
        )
    else:
        why = "the CPU has VMX without notify_vm_exiting, or the kernel is older than 6.0"
    return f"not supported (KVM_CAP_X86_NOTIFY_VMEXIT is 0): {why}; every counter stays 0 here"


def describe_lockdown(host: Host) -> str:
    """Say what the kernel's lockdown closes."""
    texts = {
        "": "mode unknown",
        "none": "none",
        "integrity": "integrity (usual with Secure Boot): counters in debugfs are closed, even to root",
        "confidentiality": "confidentiality: eBPF and traces are closed as well",
    }
    text = texts.get(host.lockdown, host.lockdown)
    return f"{text}; {host.lockdown_note}" if host.lockdown_note else text


def _describe_privileges(privileges: Privileges) -> str:
    who = "root" if privileges.uid == 0 else f"uid {privileges.uid}"
    missing = privileges.missing_capabilities
    if privileges.capabilities is None:
        return f"{who}, capabilities unknown: /proc/self/status cannot be read"
    if not missing:
        return f"{who}, with every capability that is needed"
    return f"{who}, without " + "; ".join(f"{name} ({NEEDED_CAPABILITIES[name]})" for name in missing)


def _describe_need(feature: Feature, privileges: Privileges) -> str:
    """Say which capabilities a feature needs, and which of them are held and which are missing."""
    if not feature.needs:
        return "needs no capability"
    needed = ", ".join(feature.needs)
    if privileges.capabilities is None:
        return f"needs {needed}; which are held is unknown"
    missing = [name for name in feature.needs if privileges.lacks(name)]
    if not missing:
        return f"needs {needed}; all held"
    held = [name for name in feature.needs if name not in missing]
    return f"needs {needed}; held: {', '.join(held) or 'none'}; missing: {', '.join(missing)}"


def _describe_namespaces(host: Host, privileges: Privileges) -> str:
    pid = {
        True: "pid: the host's",
        False: "pid: a container's, the host's processes are not visible: run with hostPID: true",
        None: "pid: unknown",
    }[host.initial_pid_namespace]
    user = {True: "user: the host's", False: "user: a container's, its root is not the host's", None: "user: unknown"}
    return f"{pid}; {user[privileges.initial_user_namespace]}"


def _describe_security(privileges: Privileges) -> str:
    if privileges.security_modules is None:
        parts = ["modules unknown: securityfs cannot be read"]
    else:
        parts = [",".join(privileges.security_modules) or "no module is active"]
    if privileges.label and privileges.label != "unconfined":
        parts.append(f"this process is confined as {privileges.label!r}")
    if privileges.selinux_enforcing:
        parts.append("SELinux enforces: a denial is in the audit log")
    if privileges.ptrace_scope == 3:
        parts.append("yama's ptrace_scope=3 forbids borrowing stats fds")
    return "; ".join(parts)


def _describe_source(source: SourceReport) -> str:
    if source.up:
        return f"works: {SOURCE_USES.get(source.source, 'a simulated host')}" + (
            f"; but {source.reason}" if source.reason else ""
        )
    return f"does not work: {source.reason} -> {source.remedy or NOTHING_TO_DO}"


def _describe_vms(snapshot: Snapshot) -> str:
    if not snapshot.readings:
        return "none runs" if snapshot.complete else "none found, but there may be some"
    sources = Counter(reading.source for reading in snapshot.readings if reading.source)
    unread = len(snapshot.readings) - sources.total()
    states = Counter(reading.protection for reading in snapshot.readings)
    by_source = [f"{number} by {source}" for source, number in sorted(sources.items())] or ["none"]
    by_source += [f"not {unread}"] * bool(unread and sources)
    by_state = ", ".join(f"{state} for {states[state]}" for state in Protection if states[state])
    return f"{len(snapshot.readings)} found, read {', '.join(by_source)}; notify exits {by_state}"


def _describe_verdict(snapshot: Snapshot) -> str:
    if not any(source.up for source in snapshot.sources):
        return "no source works: no counter of this host can be read"
    unread = Counter(reading.counters.problem for reading in snapshot.readings if not reading.source)
    if unread:
        reasons = "; ".join(f"{reason} ({number})" for reason, number in unread.most_common(3))
        vms = len(snapshot.readings)
        which = "the VM" if vms == 1 else f"{unread.total()} of {vms} VMs"
        return f"{which} cannot be read: {reasons}"
    if not snapshot.complete:
        return f"VMs may be missing, and what is not seen is not exported: {describe_blind_spots(snapshot)}"
    return "the counters of this host can be read"
