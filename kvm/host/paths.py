"""Where a host's file systems are: where they always are, unless the agent sees them elsewhere, as in a container."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostPaths:
    """``procfs`` and ``sysfs`` are where those are mounted, ``rootfs`` where the host's root is, for libvirt's files.

    What the agent asks of itself, and of the fds that it holds, it asks its own /proc.
    """

    procfs: Path = Path("/proc")
    sysfs: Path = Path("/sys")
    rootfs: Path = Path("/")

    @property
    def kallsyms(self) -> Path:
        """The kernel's symbols."""
        return self.procfs / "kallsyms"

    @property
    def tracefs(self) -> Path:
        """Where tracefs is mounted, if it is in its usual place."""
        return self.sysfs / "kernel/tracing"

    @property
    def kvm_debugfs(self) -> Path:
        """KVM's directory in debugfs."""
        return self.sysfs / "kernel/debug/kvm"

    @property
    def kvm_module(self) -> Path:
        """What sysfs says of the module kvm."""
        return self.sysfs / "module/kvm"

    @property
    def cgroups(self) -> Path:
        """The root of the cgroups."""
        return self.sysfs / "fs/cgroup"

    @property
    def libvirt_directories(self) -> tuple[Path, ...]:
        """Where the host's libvirt writes its domains' status."""
        return (self.rootfs / "run/libvirt/qemu",)
