"""Says what this process may do: capabilities, namespaces, seccomp, security modules. The one place that reads them.

It predicts nothing: each source finds out by trying. This is for the person who asks why one did not work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvm import abi
from kvm.host.private_mount import PrivateMount
from kvm.host.securityfs import open_securityfs

# What each capability is needed for, in words for a person.
NEEDED_CAPABILITIES = {
    "CAP_BPF": "to load eBPF programs",
    "CAP_PERFMON": "to let them read kernel memory, and to trace",
    "CAP_SYS_PTRACE": "to see and borrow other processes' fds",
    "CAP_DAC_READ_SEARCH": "to read tracefs and libvirt's files",
    "CAP_SYS_ADMIN": "for the trigger, to trace where perf_event_paranoid is 3, and where tracefs or securityfs is not "
    "mounted",
}
# What has a capability in it: include/linux/capability.h, bpf_capable() and perfmon_capable(); fs/namei.c,
# generic_permission().
IMPLIED_BY = {
    "CAP_BPF": "CAP_SYS_ADMIN",
    "CAP_PERFMON": "CAP_SYS_ADMIN",
    "CAP_DAC_READ_SEARCH": "CAP_DAC_OVERRIDE",
}
# Debian's patch "security,perf: Allow further restriction of perf_event_open" knows no CAP_PERFMON.
PARANOID_OF_DEBIAN = 3


class Feature(NamedTuple):
    """Something that the agent can do, and the capabilities that it takes on this host."""

    name: str
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Privileges:
    """What a process may do. None and "" stand for what could not be read.

    ``capabilities`` is the set of effective ones, a bit each; ``security_modules`` are those that are active in the
    kernel; ``label`` is the process's AppArmor profile or SELinux context; ``ptrace_scope`` is yama's (3 forbids
    borrowing fds altogether), ``perf_event_paranoid`` the sysctl of that name. ``is_seccomp_filtered`` says that a
    filter may refuse system calls; ``kvm_is_module`` says whether KVM's types are a module's, which take CAP_SYS_ADMIN.
    None stands for what cannot be read. ``mounted`` are the kinds of file systems that are mounted.
    """

    uid: int
    capabilities: int | None = None
    security_modules: tuple[str, ...] | None = None
    label: str = ""
    selinux_enforcing: bool = False
    ptrace_scope: int | None = None
    perf_event_paranoid: int | None = None
    initial_user_namespace: bool | None = None
    is_seccomp_filtered: bool | None = None
    kvm_is_module: bool | None = None
    mounted: frozenset[str] | None = None

    def lacks(self, capability: str) -> bool:
        """Tell whether the process is known to lack a capability, and one that implies it."""
        if self.capabilities is None:
            return False
        names = (capability, IMPLIED_BY.get(capability, capability))
        return not any(self.capabilities >> getattr(abi, name) & 1 for name in names)

    @property
    def is_unrestricted(self) -> bool:
        """Whether it is known to have every needed capability, on the host itself, and no seccomp filter."""
        return (
            self.capabilities is not None
            and not self.missing_capabilities
            and self.initial_user_namespace is True
            and self.is_seccomp_filtered is False
        )

    @property
    def missing_capabilities(self) -> tuple[str, ...]:
        """Those of NEEDED_CAPABILITIES that it lacks."""
        return tuple(name for name in NEEDED_CAPABILITIES if self.lacks(name))

    def find_features(self) -> tuple[Feature, ...]:
        """Return what each feature takes on this host.

        ``tests/live/test_capabilities.py`` measures, for a user who is not root, the rows that apply where it runs.
        """
        # tracefs and debugfs are root's own, mode 0700: root needs no capability to look into them.
        look_in = () if self.uid == 0 else ("CAP_DAC_READ_SEARCH",)
        types = () if self.kvm_is_module is False else ("CAP_SYS_ADMIN",)
        paranoid = self.perf_event_paranoid is not None and self.perf_event_paranoid >= PARANOID_OF_DEBIAN
        # debugfs mounts tracefs below itself as soon as somebody looks there.
        has_tracefs = self.mounted is None or bool(self.mounted & {"tracefs", "debugfs"})
        arming = ("CAP_SYS_ADMIN",) if paranoid or not has_tracefs else ()
        has_securityfs = self.mounted is None or "securityfs" in self.mounted
        return (
            Feature("source bpf", ("CAP_BPF", "CAP_PERFMON")),
            Feature("source stats_fd", ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")),
            Feature("source debugfs", look_in),
            Feature("owners", ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")),
            Feature("trigger", ("CAP_BPF", "CAP_PERFMON", *types)),
            Feature("RIPs", ("CAP_PERFMON", *look_in, *arming)),
            Feature("lockdown", () if has_securityfs else ("CAP_SYS_ADMIN",)),
        )


def parse_effective_capabilities(status: str) -> int | None:
    """Return the bit set of the line CapEff of a /proc/PID/status, None where it has none."""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", status, re.MULTILINE)
    return int(match[1], 16) if match else None


def parse_seccomp(status: str) -> bool | None:
    """Tell from a /proc/PID/status whether a seccomp filter is in force (mode 2), None where it does not tell."""
    match = re.search(r"^Seccomp:\s*(\d)$", status, re.MULTILINE)
    return match[1] == "2" if match else None


def parse_initial_user_namespace(uid_map: str) -> bool:
    """Tell from /proc/self/uid_map whether user ids are the host's: all of them map to themselves there."""
    return uid_map.split() == ["0", "0", str(2**32 - 1)]


def parse_mounted(mountinfo: str) -> frozenset[str]:
    """Return which kinds of file systems are mounted, from a /proc/PID/mountinfo (proc_pid_mountinfo(5))."""
    return frozenset(re.findall(r"^.*? - (\S+) ", mountinfo, re.MULTILINE))


def read_security_modules(
    sysfs: Path, open_private: Callable[[str], PrivateMount] = PrivateMount
) -> tuple[str, ...] | None:
    """Read which security modules are active, None where that cannot be read."""
    try:
        with open_securityfs(sysfs, open_private) as securityfs:
            names = (securityfs.path / "lsm").read_text().strip()
    except OSError:
        return None
    return tuple(names.split(",")) if names else ()


def read_privileges(
    proc: Path = Path("/proc"),
    sysfs: Path = Path("/sys"),
    open_private: Callable[[str], PrivateMount] = PrivateMount,
) -> Privileges:
    """Read what this process may do; raises nothing."""
    status = _read_text(proc / "self/status") or ""
    uid_map = _read_text(proc / "self/uid_map")
    mountinfo = _read_text(proc / "self/mountinfo")
    return Privileges(
        uid=os.geteuid(),
        capabilities=parse_effective_capabilities(status),
        security_modules=read_security_modules(sysfs, open_private),
        label=_read_text(proc / "self/attr/current") or "",
        selinux_enforcing=_read_text(sysfs / "fs/selinux/enforce") == "1",
        ptrace_scope=_parse_number(_read_text(proc / "sys/kernel/yama/ptrace_scope")),
        perf_event_paranoid=_parse_number(_read_text(proc / "sys/kernel/perf_event_paranoid")),
        initial_user_namespace=parse_initial_user_namespace(uid_map) if uid_map else None,
        is_seccomp_filtered=parse_seccomp(status),
        kvm_is_module=read_is_module(sysfs / "module/kvm"),
        mounted=None if mountinfo is None else parse_mounted(mountinfo),
    )


def read_is_module(directory: Path) -> bool | None:
    """Tell whether what has this directory of /sys/module was loaded; None where it is not there, or cannot be read."""
    try:
        (directory / "initstate").read_text()
    except FileNotFoundError:
        return False if directory.is_dir() else None
    except OSError:
        return None
    return True


def read_initial_pid_namespace(proc: Path) -> bool | None:
    """Tell whether our processes are numbered as the host numbers them; None where that cannot be read."""
    try:
        return (proc / "self/ns/pid").stat().st_ino == abi.PROC_PID_INIT_INO
    except OSError:
        return None


def _parse_number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,4}", text) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None
