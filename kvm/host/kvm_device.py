"""Asks /dev/kvm, the authority on what KVM can do here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kvm import abi
from kvm.errors import SourceUnavailable

# The modules that give KVM its hardware back end; kvm_pvm is KVM without VMX and SVM.
BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")


def find_kvm_module(sysfs: Path) -> str:
    """Return which back end KVM runs on: a module's name, ``kvm`` where only the common part shows, or ""."""
    for name in (*BACKENDS, "kvm"):
        if (sysfs / "module" / name).is_dir():
            return name
    return ""


def may_run_tds(sysfs: Path) -> bool:
    """Tell whether TDs (guests of Intel TDX) may run here: kvm_intel says so, or cannot be asked."""
    try:
        return (sysfs / "module/kvm_intel/parameters/tdx").read_text(errors="replace").strip() != "N"
    except FileNotFoundError:
        return False  # no kvm_intel, or one without TDX
    except OSError:
        return True


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
