"""Says what this host is and offers: CPU, microcode, kernel, lockdown, and whether KVM can do notify exits.

KVM is asked, not guessed: KVM_CHECK_EXTENSION on /dev/kvm is the authority, and where /dev/kvm cannot be opened the
answer is "unknown", never "no".
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from kvm import abi
from kvm.model import Host, SourceUnavailable

_CPUINFO_FIELDS = {
    "cpu_vendor": "vendor_id",
    "cpu_family": "cpu family",
    "cpu_model": "model",
    "cpu_stepping": "stepping",
    "cpu_model_name": "model name",
    "microcode": "microcode",
}
# The modules that give KVM its hardware back end; kvm_pvm is KVM without VMX and SVM.
BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo by name; values are as printed there."""
    block = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def parse_vmx_flags(text: str) -> frozenset[str] | None:
    """Return the flags that the ``vmx flags`` lines of all processors share, None where there is no such line."""
    lines = re.findall(r"^vmx flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else None


def parse_lockdown(text: str) -> str:
    """Return the mode in brackets of /sys/kernel/security/lockdown, "" where there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def read_lockdown(sysfs: Path) -> str:
    """Read the kernel's lockdown mode; "" where securityfs is not mounted or the kernel has no lockdown."""
    try:
        return parse_lockdown((sysfs / "kernel/security/lockdown").read_text())
    except OSError:
        return ""


def find_kvm_module(sysfs: Path) -> str:
    """Return which back end KVM runs on: a module's name, ``kvm`` where only the common part shows, or ""."""
    for name in (*BACKENDS, "kvm"):
        if (sysfs / "module" / name).is_dir():
            return name
    return ""


def read_first_pid_namespace(proc: Path) -> bool | None:
    """Tell whether our processes are numbered as the host numbers them; None where that cannot be read."""
    try:
        return (proc / "self/ns/pid").stat().st_ino == abi.PROC_PID_INIT_INO
    except OSError:
        return None


def open_kvm(device: Path) -> int:
    """Open /dev/kvm; raises SourceUnavailable with what to do."""
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise SourceUnavailable(f"{device} does not exist", "load kvm_intel or kvm_amd") from err
    except PermissionError as err:
        raise SourceUnavailable(f"{device}: {err.strerror}", "run as root or in the group kvm") from err
    except OSError as err:
        raise SourceUnavailable(f"{device}: {err.strerror}") from err


def read_notify_supported(device: Path) -> bool:
    """Ask KVM whether it can force notify exits on this CPU.

    KVM_CHECK_EXTENSION(KVM_CAP_X86_NOTIFY_VMEXIT), Documentation/virt/kvm/api.rst 7.33: 0 where kernel, CPU or an outer
    hypervisor does not offer it. Raises SourceUnavailable where KVM cannot be asked.
    """
    fd = open_kvm(device)
    try:
        return fcntl.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_X86_NOTIFY_VMEXIT) > 0
    except OSError as err:
        raise SourceUnavailable(f"{device} does not answer KVM_CHECK_EXTENSION: {err.strerror}") from err
    finally:
        os.close(fd)


def read_host(proc: Path = Path("/proc"), sysfs: Path = Path("/sys"), device: Path = Path("/dev/kvm")) -> Host:
    """Read what the host is and offers; what cannot be read is "" or None. Raises nothing."""
    try:
        cpuinfo = parse_cpuinfo((proc / "cpuinfo").read_text(errors="replace"))
    except OSError:
        cpuinfo = {}
    try:
        supported, reason = read_notify_supported(device), ""
    except SourceUnavailable as err:
        supported, reason = None, str(err)
    return Host(
        kernel=os.uname().release,
        lockdown=read_lockdown(sysfs),
        kvm_module=find_kvm_module(sysfs),
        notify_supported=supported,
        notify_unknown_reason=reason,
        first_pid_namespace=read_first_pid_namespace(proc),
        **{ours: cpuinfo.get(theirs, "") for ours, theirs in _CPUINFO_FIELDS.items()},
    )
