"""Says what this host is and offers: CPU, microcode, kernel, lockdown, and whether KVM can do notify exits.

KVM is asked, not guessed: KVM_CHECK_EXTENSION on /dev/kvm is the authority, and where /dev/kvm cannot be opened the
answer is "unknown", never "no".
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from kvm.errors import SourceUnavailable
from kvm.host.kvm_device import find_kvm_module, read_notify_supported
from kvm.host.lockdown import read_lockdown
from kvm.host.private_mount import PrivateMount
from kvm.host.privileges import read_initial_pid_namespace
from kvm.model import Host

_CPUINFO_FIELDS = {
    "cpu_vendor": "vendor_id",
    "cpu_family": "cpu family",
    "cpu_model": "model",
    "cpu_stepping": "stepping",
    "cpu_model_name": "model name",
    "microcode": "microcode",
}


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo by name; values are as printed there."""
    block = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def parse_vmx_flags(text: str) -> frozenset[str] | None:
    """Return the flags that the ``vmx flags`` lines of all processors share, None where there is no such line."""
    lines = re.findall(r"^vmx flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else None


def read_vmx_flags(proc: Path) -> frozenset[str] | None:
    """Read the VMX flags of the CPU; None where it shows none, or where /proc/cpuinfo cannot be read."""
    try:
        return parse_vmx_flags((proc / "cpuinfo").read_text(errors="replace"))
    except OSError:
        return None


def read_host(
    proc: Path = Path("/proc"),
    sysfs: Path = Path("/sys"),
    device: Path = Path("/dev/kvm"),
    open_private: Callable[[str], PrivateMount] = PrivateMount,
) -> Host:
    """Read what the host is and offers; what cannot be read is "" or None. Raises nothing."""
    cpuinfo, cpu_unknown_reason = dict[str, str](), ""
    try:
        cpuinfo = parse_cpuinfo((proc / "cpuinfo").read_text(errors="replace"))
        if not any(cpuinfo.get(name) for name in _CPUINFO_FIELDS.values()):
            cpu_unknown_reason = "/proc/cpuinfo does not name the CPU"
    except OSError as err:
        hint = "; in a unit: ProcSubset=pid" if err.errno == errno.ENOENT else ""
        cpu_unknown_reason = f"/proc/cpuinfo cannot be read ({err.strerror}{hint})"
    try:
        supported, reason = read_notify_supported(device), ""
    except SourceUnavailable as err:
        supported, reason = None, str(err)
    lockdown = read_lockdown(sysfs, open_private)
    return Host(
        kernel=os.uname().release,
        lockdown=lockdown.mode,
        lockdown_note=lockdown.note,
        kvm_module=find_kvm_module(sysfs),
        notify_supported=supported,
        notify_unknown_reason=reason,
        cpu_unknown_reason=cpu_unknown_reason,
        initial_pid_namespace=read_initial_pid_namespace(proc),
        **{ours: cpuinfo.get(theirs, "") for ours, theirs in _CPUINFO_FIELDS.items()},
    )
