"""Says what this process may do: capabilities, namespaces, and the security modules that may stand in the way.

It predicts nothing: each source finds out by trying. This is for the person who asks why one did not work.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvm import abi

# What each capability is needed for, in words for a person.
NEEDED_CAPABILITIES = {
    "CAP_SYS_PTRACE": "to see and borrow other processes' fds",
    "CAP_BPF": "to load eBPF programs",
    "CAP_PERFMON": "to trace the kernel",
    "CAP_SYS_ADMIN": "to read the BTF of kernel modules",
}


@dataclass(frozen=True, slots=True)
class Privileges:
    """What a process may do. None and "" stand for what could not be read.

    ``missing_capabilities`` are those of NEEDED_CAPABILITIES that are not effective; ``label`` is the process's
    AppArmor profile or SELinux context; ``ptrace_scope`` is yama's (3 forbids borrowing fds altogether).
    """

    uid: int
    missing_capabilities: tuple[str, ...] | None
    security_modules: tuple[str, ...]
    label: str
    selinux_enforcing: bool
    ptrace_scope: int | None
    initial_user_namespace: bool | None


def parse_effective_capabilities(status: str) -> int | None:
    """Return the bit set of the line CapEff of a /proc/PID/status, None where it has none."""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", status, re.MULTILINE)
    return int(match[1], 16) if match else None


def find_missing_capabilities(effective: int | None) -> tuple[str, ...] | None:
    """Return the names of the needed capabilities that a bit set lacks, None where there is no bit set."""
    if effective is None:
        return None
    return tuple(name for name in NEEDED_CAPABILITIES if not effective >> getattr(abi, name) & 1)


def parse_initial_user_namespace(uid_map: str) -> bool:
    """Tell from /proc/self/uid_map whether user ids are the host's: all of them map to themselves there."""
    return uid_map.split() == ["0", "0", str(2**32 - 1)]


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def read_privileges(proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> Privileges:
    """Read what this process may do; raises nothing."""
    effective = parse_effective_capabilities(_read_text(proc / "self/status") or "")
    modules = _read_text(sysfs / "kernel/security/lsm")
    scope = _read_text(proc / "sys/kernel/yama/ptrace_scope")
    uid_map = _read_text(proc / "self/uid_map")
    return Privileges(
        uid=os.geteuid(),
        missing_capabilities=find_missing_capabilities(effective),
        security_modules=tuple(modules.split(",")) if modules else (),
        label=_read_text(proc / "self/attr/current") or "",
        selinux_enforcing=_read_text(sysfs / "fs/selinux/enforce") == "1",
        ptrace_scope=int(scope) if scope and scope.isdigit() else None,
        initial_user_namespace=parse_initial_user_namespace(uid_map) if uid_map else None,
    )


def read_initial_pid_namespace(proc: Path) -> bool | None:
    """Tell whether our processes are numbered as the host numbers them; None where that cannot be read."""
    try:
        return (proc / "self/ns/pid").stat().st_ino == abi.PROC_PID_INIT_INO
    except OSError:
        return None
