"""Says why the kernel or libbpf refused a BPF program, and what a person can do about it.

The kernel gives one number for many causes, EPERM for most. So what it checks is checked again, after the fact:
capabilities, lockdown, namespaces, seccomp, BTF; and the verifier's last line is quoted where it refused a program.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kvm.errors import SourceUnavailable
from kvm.host.lockdown import Lockdown, read_lockdown
from kvm.host.privileges import Privileges, read_privileges

# What libbpf says where it may not look for a function in modules (load_module_btfs in its libbpf.c).
_SEARCHES_MODULES = "failed to iterate BTF objects"
_VERIFIER_STATISTICS = ("processed ", "verification time", "stack depth", "mark_precise", "max_states")


def explain(
    err: OSError,
    messages: Iterable[str],
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    *,
    attaches: bool = False,
    read_mode: Callable[[Path], Lockdown] = read_lockdown,
) -> SourceUnavailable:
    """Make a SourceUnavailable of an error of libbpf; ``messages`` are libbpf's last ones. Raises nothing.

    ``attaches`` says that the programs attach to a function of KVM, for which they need its module's own types.
    """
    privileges = read_privileges(proc, sys)
    module = privileges.kvm_is_module is True
    denied = err.errno in (errno.EPERM, errno.EACCES)
    refusal = find_refusal(messages)
    searched = denied and _SEARCHES_MODULES in refusal
    types = "kvm is a module" if module and attaches else "modules are searched for the function" if searched else ""
    missing = find_missing_capabilities(privileges, types)
    causes = (
        (
            err.errno in (errno.EMFILE, errno.ENFILE),
            f"too few fds are left to load the programs: {err.strerror}",
            "raise the service's limit of open files (LimitNOFILE)",
        ),
        (err.errno == errno.ENOMEM, f"no memory for the programs: {err}", "free some memory on this host"),
        (
            not (sys / "kernel/btf/vmlinux").exists(),
            "the kernel describes no types of its own: /sys/kernel/btf/vmlinux is missing",
            "use a kernel with CONFIG_DEBUG_INFO_BTF; in a container, mount the host's /sys",
        ),
        (
            read_mode(sys).mode == "confidentiality",
            "lockdown=confidentiality: BPF may not read kernel memory",
            "use lockdown=integrity",
        ),
        (
            bool(missing) and (denied or (module and attaches)),
            f"missing capability: {', '.join(missing)}",
            "give it to the service or the container",
        ),
        (
            denied and privileges.initial_user_namespace is False,
            "capabilities of a user namespace do not reach BPF",
            "run in the host's user namespace",
        ),
        (
            module and not (sys / "kernel/btf/kvm").exists(),
            "the kvm module describes no types: /sys/kernel/btf/kvm is missing",
            "use a kernel with CONFIG_DEBUG_INFO_BTF_MODULES",
        ),
        (
            denied and privileges.is_seccomp_filtered is True,
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


def find_missing_capabilities(privileges: Privileges, types: str = "") -> tuple[str, ...]:
    """Return what a process lacks to load BPF programs; ``types`` says why they need the types of modules, if so.

    Those are had through BPF_BTF_GET_NEXT_ID and BPF_BTF_GET_FD_BY_ID, which take CAP_SYS_ADMIN itself
    (kernel/bpf/syscall.c).
    """
    if not privileges.lacks("CAP_SYS_ADMIN"):
        return ()
    names = [name for name in ("CAP_BPF", "CAP_PERFMON") if privileges.lacks(name)]
    return (*names, *((f"CAP_SYS_ADMIN (while loading, because {types})",) if types else ()))


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
