"""Finds out whose VM a process is: from the VMM's command line, libvirt's status XML of that process, and its cgroup.

``Owner.identity`` says which of these vouches for the answer (``kvm/identity/evidence.py``):

* ``libvirt``: a status XML of root's in the host's directory; ``container``: one below the process's own root;
* ``cgroup``: a cgroup of root's that is named after the VM, as libvirt, Proxmox VE and Firecracker's jailer make it;
* ``cmdline``: nobody but the command line; ``claimed``: a status XML that the VM's own user can write.

* ``name`` is what the VMM or libvirt calls the VM, except that a KubeVirt domain ``<namespace>_<name>`` is told apart
  into ``namespace`` and ``name``; that takes evidence (KubeVirt's metadata in the status XML, or a pod's cgroup where
  there is no status XML to read), because underscores occur in other names.
* ``project`` is OpenStack's project id, and its name only where there is no id: names change and repeat.

A status XML counts only if its pid is that of the process and its name is that of the command line, since files stay
behind and names repeat. libvirt counts pids in its own namespace: in a container (KubeVirt's virt-launcher) that is
another number, and every number that the process has (NSpid) will do; in the host's own directories only ours will.
The status may also be that of a session daemon, one directory deeper (``.../libvirt/qemu/run``), as in virt-launcher.

Whoever fills a container can write there what they like. A status below the process's own root vouches for its VM only
where it is root's and the VM's process is not; else what it says of the owner is a claim. Where the mount namespace
belongs to a user namespace of the container's own, nothing below its root is opened at all.

A process that holds a VM has long replaced libvirtd's command line by its own: KVM files are opened after exec.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvm.discovery.processes import read_uid
from kvm.errors import MalformedData, VmGone
from kvm.identity.evidence import CGROUPS, has_hosts_mounts, has_named_cgroup, is_roots_process
from kvm.identity.libvirt_status import DomainStatus, read_domain_status, read_limited
from kvm.identity.vmm_cmdline import clean_text, parse_arguments, parse_cmdline, parse_uuid
from kvm.model import Identity, Owner

LIBVIRT_DIRECTORIES = (Path("/run/libvirt/qemu"),)
# Below a process's own root, where /var/run need not be a link to /run
_LIBVIRT_IN_ROOT = ("run/libvirt/qemu", "run/libvirt/qemu/run", "var/run/libvirt/qemu", "var/run/libvirt/qemu/run")

CMDLINE_BYTES = 1 << 20
_SMALL_FILE_BYTES = 1 << 16

# A pod's cgroup, with either cgroup driver: /kubepods/..., /kubepods.slice/kubepods-burstable.slice/..., and the same
# below kubelet.slice. From inside another pod's cgroup namespace the path is relative, to a sibling: /../podUID
_POD_CGROUP = re.compile(r"[/-]kubepods[./-]|:/\.\.(?:/[^/\n]+)*/pod[0-9a-f][-0-9a-f]*(?:/|$)", re.MULTILINE)
# Namespaces are DNS labels and names DNS subdomains: neither can hold an underscore
_KUBEVIRT_DOMAIN = re.compile(r"([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)_([a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?)")


class Problem(NamedTuple):
    """Something about a VM's owner that could not be read: a word for counting, and a sentence."""

    kind: str
    message: str


class OwnerReading(NamedTuple):
    """Whose VM it is, and what could not be read of that."""

    owner: Owner
    problems: tuple[Problem, ...] = ()


def parse_namespace_pids(status: str) -> frozenset[int]:
    """Return the process's numbers in each pid namespace, from a /proc/PID/status."""
    match = re.search(r"^NSpid:((?:\s+\d{1,10})+)$", status, re.MULTILINE | re.ASCII)
    return frozenset(int(number) for number in match[1].split()) if match else frozenset()


def parse_pod_cgroup(cgroup: str) -> bool:
    """Tell from a /proc/PID/cgroup whether the process runs in a pod of Kubernetes."""
    return _POD_CGROUP.search(cgroup) is not None


def read_program(proc: Path, pid: int, tid: int) -> tuple[str, str]:
    """Read process name and path of the executable, "" for a path that cannot be had; neither takes the mmap_lock.

    The leader gives the name (it keeps it after it has exited), ``tid`` the path. Raises VmGone.
    """
    directory = proc / str(pid)
    try:
        comm = _read_text(directory / "comm").removesuffix("\n")
    except OSError as err:
        raise VmGone(f"process {pid} has ended") from err
    # A process that is just ending has no link, and without CAP_SYS_PTRACE it may not be read: the name serves.
    with contextlib.suppress(OSError):
        link = os.readlink(directory / "task" / str(tid) / "exe")
        return comm, os.fsencode(link).decode("utf-8", "replace")
    return comm, ""


def read_owner(
    proc: Path,
    pid: int,
    tid: int,
    libvirt_directories: Sequence[Path] = LIBVIRT_DIRECTORIES,
    cgroups: Path = CGROUPS,
) -> OwnerReading:
    """Read whose VM process ``pid`` is, through its living thread ``tid``.

    It may hang for as long as the process holds its mmap_lock, or a file system in its mount namespace does not
    answer. Raises VmGone; everything else costs what could not be read, and is told in the problems.
    """
    comm, executable = read_program(proc, pid, tid)
    try:
        arguments = parse_arguments(read_limited(proc / str(pid) / "task" / str(tid) / "cmdline", CMDLINE_BYTES))
    except (FileNotFoundError, ProcessLookupError) as err:
        raise VmGone(f"process {pid} has ended") from err
    except OSError as err:
        program = replace(parse_cmdline((), comm, executable), uid=read_uid(proc, pid))
        return OwnerReading(program, (Problem("unreadable", f"its command line: {err}"),))
    if not arguments and not executable:  # it has given up its memory, and so is ending
        raise VmGone(f"process {pid} is ending")
    owner = replace(parse_cmdline(arguments, comm, executable), uid=read_uid(proc, pid))
    found: tuple[DomainStatus, Identity] | None = None
    problems: tuple[Problem, ...] = ()
    if owner.vmm == "qemu" and owner.name:
        found, problems = _find_domain_status(proc, pid, tid, libvirt_directories, owner.name)
    if found is not None:
        status, identity = found
    else:
        status, identity = None, _find_identity(owner, has_named_cgroup(proc, pid, owner, cgroups))
    return OwnerReading(_add_libvirt(replace(owner, identity=identity), status, proc / str(pid) / "cgroup"), problems)


def _find_identity(owner: Owner, has_cgroup: bool) -> Identity:
    if has_cgroup:
        return Identity.CGROUP
    return Identity.CMDLINE if owner.name or owner.uuid or owner.own_id else Identity.PROCESS


def _add_libvirt(owner: Owner, status: DomainStatus | None, cgroup: Path) -> Owner:
    if status is not None:
        project = clean_text(status.project_id or status.project_name)
        display_name = clean_text(status.display_name)
        uuid = owner.uuid or parse_uuid(status.uuid)
        owner = replace(owner, uuid=uuid, project=project, display_name=display_name)
    domain = _KUBEVIRT_DOMAIN.fullmatch(owner.name)
    if domain is None or not (_is_in_pod(cgroup) if status is None else status.is_kubevirt):
        return owner
    return replace(owner, namespace=domain[1], name=domain[2])


def _is_in_pod(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):  # the process has ended, or the host has no cgroups: no evidence
        return parse_pod_cgroup(_read_text(cgroup))
    return False


def _find_domain_status(
    proc: Path, pid: int, tid: int, libvirt_directories: Sequence[Path], name: str
) -> tuple[tuple[DomainStatus, Identity] | None, tuple[Problem, ...]]:
    """Find the status of this very process, and who vouches for it.

    The host's directories come first, which no container can write to.
    """
    pids = frozenset({pid})
    with contextlib.suppress(OSError):  # then our own number is all that is known
        pids |= parse_namespace_pids(_read_text(proc / str(pid) / "status"))
    root = proc / str(pid) / "task" / str(tid) / "root"
    places = [(directory, ".", frozenset({pid})) for directory in libvirt_directories]
    if has_hosts_mounts(proc, pid, tid):
        places += [(root, directory, pids) for directory in _LIBVIRT_IN_ROOT]
    problems: dict[str, Problem] = {}
    for base, directory, accepted_pids in places:
        try:
            status = read_domain_status(base, directory, name)
        except OSError as err:
            problems.setdefault("unreadable", Problem("unreadable", f"libvirt's status in {base}/{directory}: {err}"))
        except MalformedData as err:
            problems.setdefault("malformed", Problem("malformed", f"libvirt's status {err}"))
        else:
            if status is not None and status.name == name and status.pid in accepted_pids:
                identity = Identity.LIBVIRT if base != root else Identity.CONTAINER
                if not status.is_roots or (base == root and is_roots_process(proc, pid)):
                    identity = Identity.CLAIMED
                return (status, identity), tuple(problems.values())
    return None, tuple(problems.values())


def _read_text(path: Path) -> str:
    return read_limited(path, _SMALL_FILE_BYTES).decode("utf-8", "replace")
