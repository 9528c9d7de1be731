"""What ``check`` says of hosts of all kinds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from exporter.host_summary import can_read, render_check
from kvm.host.privileges import Privileges
from kvm.model import SourceReport
from tests.snapshots import CLOSED, HIDDEN, INTEL, UP, make_reading, make_snapshot, make_unread

ALL = 2**41 - 1
ROOT = Privileges(
    uid=0,
    capabilities=ALL,
    security_modules=("lockdown", "capability", "yama"),
    label="unconfined",
    ptrace_scope=1,
    kvm_is_module=False,
    initial_user_namespace=True,
)
TRACING = "can be told: exits can be traced, by tracefs"
SERIES = "57 with these flags"
NO_VMX = replace(INTEL, kvm_module="kvm_pvm", notify_supported=False)


def test_a_good_host_is_told_so() -> None:
    snapshot = make_snapshot(make_reading(), make_unread())
    text = render_check(snapshot, ROOT, frozenset({"notify_vm_exiting"}), TRACING, series=SERIES)
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["source stats_fd"].strip().startswith("works: every vCPU")
    assert lines["source debugfs"].strip() == "does not work: the kernel's lockdown forbids it -> nothing to do"
    assert "family 6 model 143 stepping 8, microcode 0x2b000620" in lines["host"]
    assert lines["notify exits"].strip().startswith("supported")
    assert lines["VMs"].strip() == "2 found, read 1 by stats_fd, not 1; notify exits unknown for 2"
    assert can_read(snapshot)


@pytest.mark.parametrize(
    ("host", "flags", "words"),
    [
        (NO_VMX, None, ["without VMX or SVM", "not supported", "the CPU shows no VMX", "every counter stays 0"]),
        (replace(INTEL, notify_supported=False), frozenset({"vnmi"}), ["without notify_vm_exiting"]),
        (replace(INTEL, notify_supported=False), frozenset({"notify_vm_exiting"}), ["KVM is too old"]),
        (
            replace(INTEL, notify_supported=None, notify_unknown_reason="/dev/kvm does not exist; load kvm_intel"),
            None,
            ["/dev/kvm does not exist; load kvm_intel", "unknown: KVM cannot be asked"],
        ),
        (replace(INTEL, lockdown="confidentiality"), None, ["eBPF and traces are closed"]),
        (
            replace(INTEL, lockdown="", lockdown_note="securityfs is not mounted"),
            None,
            ["mode unknown; securityfs is not mounted"],
        ),
        (replace(INTEL, initial_pid_namespace=False), None, ["hostPID: true"]),
        (replace(INTEL, cpu_unknown_reason="hidden"), None, ["CPU unknown: hidden"]),
        (replace(NO_VMX, cpu_unknown_reason="hidden"), None, ["why is not known"]),
    ],
)
def test_each_obstacle_is_named(host: object, flags: frozenset[str] | None, words: list[str]) -> None:
    text = render_check(make_snapshot(host=host), ROOT, flags, TRACING, series=SERIES)  # type: ignore[arg-type]
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("privileges", "words"),
    [
        (replace(ROOT, uid=1000, capabilities=ALL & ~(1 << 19)), ["uid 1000, without CAP_SYS_PTRACE"]),
        (replace(ROOT, label="snap.agent (enforce)"), ["confined as 'snap.agent (enforce)'"]),
        (replace(ROOT, selinux_enforcing=True), ["SELinux enforces"]),
        (replace(ROOT, ptrace_scope=3), ["ptrace_scope=3 forbids"]),
        (replace(ROOT, initial_user_namespace=False), ["its root is not the host's"]),
    ],
)
def test_what_confines_the_process_is_named(privileges: Privileges, words: list[str]) -> None:
    text = render_check(make_snapshot(), privileges, None, TRACING, series=SERIES)
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("sources", "complete", "expected"),
    [
        ((UP,), True, True),
        ((CLOSED,), True, False),
        ((CLOSED, UP), True, True),
        ((UP,), False, False),
        ((), True, False),
    ],
)
def test_the_verdict(sources: tuple[SourceReport, ...], complete: bool, expected: bool) -> None:
    assert can_read(make_snapshot(sources=sources, blind_spots=() if complete else HIDDEN)) is expected


def test_a_host_whose_vms_nobody_can_read_is_not_told_that_all_is_well() -> None:
    snapshot = make_snapshot(make_unread(), make_unread(pid=4344))
    assert not can_read(snapshot)
    text = render_check(snapshot, ROOT, None, TRACING, series=SERIES)
    assert "2 of 2 VMs cannot be read: its VMM holds no stats fds (2)" in text
    partly = make_snapshot(make_reading(), make_unread())
    assert can_read(partly)
    assert "1 of 2 VMs cannot be read" in render_check(partly, ROOT, None, TRACING, series=SERIES)


def test_root_without_cap_bpf_is_not_told_that_it_lacks_what_it_does_not_need() -> None:
    text = render_check(make_snapshot(), replace(ROOT, capabilities=ALL & ~(1 << 39)), None, TRACING, series=SERIES)
    assert "with every capability that is needed" in text


@pytest.mark.parametrize(("modules", "said"), [(None, "modules unknown"), ((), "no module is active")])
def test_security_modules_that_are_not_known_are_not_said_to_be_absent(
    modules: tuple[str, ...] | None, said: str
) -> None:
    assert said in render_check(make_snapshot(), replace(ROOT, security_modules=modules), None, TRACING, series=SERIES)


@pytest.mark.parametrize(
    ("privileges", "line"),
    [
        (ROOT, "for source bpf  needs CAP_BPF, CAP_PERFMON; all held"),
        (ROOT, "for source debugfs  needs no capability"),
        (replace(ROOT, uid=990), "for source debugfs  needs CAP_DAC_READ_SEARCH; all held"),
        (
            replace(ROOT, capabilities=1 << 39),
            "for source bpf  needs CAP_BPF, CAP_PERFMON; held: CAP_BPF; missing: CAP_PERFMON",
        ),
        (
            replace(ROOT, uid=990, capabilities=0, perf_event_paranoid=3),
            "for RIPs  needs CAP_PERFMON, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN; held: none; "
            "missing: CAP_PERFMON, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN",
        ),
        (
            replace(ROOT, capabilities=1 << 38 | 1 << 39, kvm_is_module=True),
            "for trigger  needs CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN; "
            "held: CAP_BPF, CAP_PERFMON; missing: CAP_SYS_ADMIN",
        ),
        (replace(ROOT, mounted=frozenset({"debugfs"})), "for RIPs  needs CAP_PERFMON; all held"),
        (replace(ROOT, mounted=frozenset({"proc"})), "for RIPs  needs CAP_PERFMON, CAP_SYS_ADMIN; all held"),
        (replace(ROOT, mounted=frozenset({"securityfs"})), "for lockdown  needs no capability"),
        (
            replace(ROOT, capabilities=0, mounted=frozenset()),
            "for lockdown  needs CAP_SYS_ADMIN; held: none; missing: CAP_SYS_ADMIN",
        ),
        (replace(ROOT, capabilities=1 << 38 | 1 << 39), "for trigger  needs CAP_BPF, CAP_PERFMON; all held"),
        (
            replace(ROOT, capabilities=None),
            "for owners  needs CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH; which are held is unknown",
        ),
    ],
)
def test_what_each_feature_needs_holds_and_lacks(privileges: Privileges, line: str) -> None:
    lines = render_check(make_snapshot(), privileges, None, TRACING, series=SERIES).splitlines()
    assert line in [re.sub(" {2,}", "  ", found) for found in lines]
