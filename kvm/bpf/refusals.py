"""Says why the kernel or libbpf refused a BPF program, and what a person can do about it.

The kernel gives one number for many causes, EPERM for most. So what it looks at is looked at again, after the fact:
capabilities, lockdown, namespaces, seccomp, BTF; and the verifier's last line is quoted where it refused a program.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from kvm import abi
from kvm.errors import SourceUnavailable

_WHOLE_UID_RANGE = ["0", "0", "4294967295"]
_VERIFIER_STATISTICS = ("processed ", "verification time", "stack depth", "mark_precise", "max_states")
_FILTERED = re.compile(r"^Seccomp:\s*2", re.MULTILINE)


def explain(
    err: OSError, messages: Iterable[str], proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> SourceUnavailable:
    """Make a SourceUnavailable of an error of libbpf; ``messages`` are libbpf's last ones. Raises nothing."""
    status = _read(proc / "self/status")
    module = (sys / "module/kvm/initstate").exists()
    missing = find_missing_capabilities(status, module=module)
    denied = err.errno in (errno.EPERM, errno.EACCES)
    refusal = find_refusal(messages)
    causes = (
        (
            err.errno in (errno.EMFILE, errno.ENFILE),
            f"{os.strerror(errno.EMFILE)}: {err}",
            "raise the service's limit of open files (LimitNOFILE)",
        ),
        (err.errno == errno.ENOMEM, f"no memory for the programs: {err}", "free some memory on this host"),
        (
            not (sys / "kernel/btf/vmlinux").exists(),
            "the kernel describes no types of its own: /sys/kernel/btf/vmlinux is missing",
            "use a kernel with CONFIG_DEBUG_INFO_BTF; in a container, mount the host's /sys",
        ),
        (
            "[confidentiality]" in _read(sys / "kernel/security/lockdown"),
            "lockdown=confidentiality: BPF may not read kernel memory",
            "use lockdown=integrity",
        ),
        (
            bool(missing) and (denied or module),
            f"missing capability: {', '.join(missing)}",
            "give it to the service or the container",
        ),
        (
            denied and _read(proc / "self/uid_map").split() not in ([], _WHOLE_UID_RANGE),
            "capabilities of a user namespace do not reach BPF",
            "run in the host's user namespace",
        ),
        (
            module and not (sys / "kernel/btf/kvm").exists(),
            "the kvm module describes no types: /sys/kernel/btf/kvm is missing",
            "use a kernel with CONFIG_DEBUG_INFO_BTF_MODULES",
        ),
        (
            denied and _FILTERED.search(status) is not None,
            f"{refusal or err}: perhaps a seccomp filter forbids bpf(2)",
            "let the container call bpf(2)",
        ),
        (
            denied,
            f"{refusal or err}, although no capability is missing",
            "ask who set this host up: a security module or the kernel itself forbids it",
        ),
    )
    for holds, reason, remedy in causes:
        if holds:
            return SourceUnavailable(reason, remedy)
    return SourceUnavailable(refusal or str(err), "please report this with the kernel's version")


def find_missing_capabilities(status: str, *, module: bool) -> tuple[str, ...]:
    """Return what the process of this /proc/PID/status lacks; ``module`` says that KVM is one.

    CAP_SYS_ADMIN implies the others (capable.h: bpf_capable, perfmon_capable). Types of a module are had through
    BPF_BTF_GET_FD_BY_ID, which takes CAP_SYS_ADMIN itself (kernel/bpf/syscall.c).
    """
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if match is None:
        return ()
    held = int(match[1], 16)
    if held >> abi.CAP_SYS_ADMIN & 1:
        return ()
    names = [name for name, bit in (("CAP_BPF", abi.CAP_BPF), ("CAP_PERFMON", abi.CAP_PERFMON)) if not held >> bit & 1]
    return (*names, *(("CAP_SYS_ADMIN (while loading, because kvm is a module)",) if module else ()))


def find_refusal(messages: Iterable[str]) -> str:
    """Return the verifier's reason, else what libbpf says has failed first, "" if it says nothing.

    The verifier's log ends in statistics ("processed 15 insns ..."); its reason is the line before.
    """
    failed = ""
    for message in messages:
        _, begin, rest = message.partition("-- BEGIN PROG LOAD LOG --")
        lines = [line.strip() for line in rest.partition("-- END PROG LOAD LOG --")[0].splitlines()]
        reasons = [line for line in lines if line and not line.startswith(_VERIFIER_STATISTICS)]
        if begin and reasons:
            program = re.search(r"prog '(\w+)'", message)
            return f"the kernel's verifier refused {program[1] if program else 'a program'}: {reasons[-1]}"
        if not failed and "failed" in message:
            failed = message.splitlines()[0].removeprefix("libbpf: ")
    return failed


def check_own_pid(tgid: int) -> None:
    """Compare our pid as BPF sees it with our own view; raises SourceUnavailable in a pid namespace of our own."""
    if tgid != os.getpid():
        raise SourceUnavailable(
            f"this runs in a pid namespace of its own (pid {os.getpid()} here, {tgid} on the host)",
            "Kubernetes: hostPID: true; docker or podman: --pid=host",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # what cannot be seen explains nothing
