"""Who vouches for what a VM is called: only facts that no unprivileged user of the host can make up.

A command line is whatever its starter has written, and a file below a VM's root whatever the VM's user has put there:
both are claims. Evidence is what root has made: a file of root's that others cannot write, a cgroup of root's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from pathlib import Path

from kvm import abi
from kvm.discovery.processes import read_uids
from kvm.model import Owner

CGROUPS = Path("/sys/fs/cgroup")

# libvirt's name of a machine, as systemd escapes it for a unit: docs/cgroups.rst, virDomainGenerateMachineName() in
# src/conf/domain_conf.c: "qemu-", the domain's id, "-", and of the name what fits a host name, 64 bytes in all
_MACHINE = re.compile(r"machine-qemu-\d+-(.+)\.scope|qemu-\d+-(.+)\.libvirt-qemu")
_UNFIT_FOR_HOST_NAME = re.compile(r"[^0-9A-Za-z.-]")
# systemd.unit(5): characters that a unit's name cannot hold, as \xNN
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


def parse_cgroup_paths(text: str) -> dict[str, str]:
    """Return the paths in a /proc/PID/cgroup by controllers ("" is the unified hierarchy)."""
    lines = (line.split(":", 2) for line in text.splitlines())
    return {fields[1]: fields[2] for fields in lines if len(fields) == 3}


def find_named_cgroup(path: str, owner: Owner) -> str:
    """Return the part of a cgroup's path that ends with a cgroup named after this VM; "" where there is none."""
    steps = path.split("/")
    for number, step in enumerate(steps):
        machine = _MACHINE.fullmatch(_ESCAPED.sub(lambda match: chr(int(match[1], 16)), step))
        if machine is not None and owner.name:
            if _UNFIT_FOR_HOST_NAME.sub("", owner.name).startswith(machine[1] or machine[2]):
                return "/".join(steps[: number + 1])
        elif owner.own_id and step.removesuffix(".scope").removesuffix(".service") == owner.own_id:
            return "/".join(steps[: number + 1])
    return ""


def has_named_cgroup(proc: Path, pid: int, owner: Owner, cgroups: Path = CGROUPS) -> bool:
    """Tell whether the process runs in a cgroup that root has made and named after the VM."""
    try:
        paths = parse_cgroup_paths((proc / str(pid) / "cgroup").read_text(errors="replace"))
    except OSError:
        return False
    for controllers, path in paths.items():
        found = find_named_cgroup(path, owner)
        hierarchy = cgroups / controllers.removeprefix("name=") if controllers else cgroups
        # Below a cgroup namespace of our own, paths begin with "/..": they do not lead there from the mount.
        if found and ".." not in found.split("/") and _is_roots(Path(f"{hierarchy}{found}")):
            return True
    return False


def is_roots_file(fd: int) -> bool:
    """Tell whether an open file or directory is root's, and nobody else may write to it."""
    found = os.fstat(fd)
    return found.st_uid == 0 and not stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)


def is_roots_process(proc: Path, pid: int) -> bool:
    """Tell whether a process has uid 0 in any way, or whether that is not known: it can write root's files."""
    uids = read_uids(proc, pid)
    return not uids or 0 in uids


def has_hosts_mounts(proc: Path, pid: int, tid: int) -> bool:
    """Tell whether whoever made the process's mount namespace was root of the host.

    In a mount namespace of another user namespace any user can mount what they like: overlays, and file systems of
    their own that never answer. NS_GET_USERNS: Linux kernel commit bcac25a58bfc "kernel: add a helper to get an owning
    user namespace for a namespace" (in v4.9).
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        namespace = os.open(proc / str(pid) / "task" / str(tid) / "ns" / "mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, namespace)
        owner = fcntl.ioctl(namespace, abi.NS_GET_USERNS)
        stack.callback(os.close, owner)
        return os.fstat(owner).st_ino == abi.PROC_USER_INIT_INO
    return False


def _is_roots(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        found = directory.stat()
        return found.st_uid == 0 and not stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    return False
