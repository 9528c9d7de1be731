"""The ways to be blind, each as what is done to the agent's process before it starts."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from kvm.host.privileges import NEEDED_CAPABILITIES
from tests.own_mounts import UNMOUNT_ALL

ROOT: Final = Path(__file__).parents[2]
# Debian's, which everybody may run: the one of a virtual environment may lie in somebody's home.
PYTHON: Final = "/usr/bin/python3"
# Of its own: VMs of nobody else are this user's, and those it may see whatever hides others.
USER: Final = 64321
CAPABILITIES: Final = tuple(NEEDED_CAPABILITIES)


class Sees(StrEnum):
    """What a way leaves of the host's VMs; ``ANY`` for combinations of which nobody knows beforehand."""

    ALL = "all"
    SOME = "some"
    NONE = "none"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What is taken from an agent.

    ``held`` are its capabilities as a user of no other rights, None for root with all of them; ``mounts`` are a shell's
    words in a mount namespace of its own, where ``$STAGE`` is what `make_stage` has made; ``namespaces`` are unshare's
    flags, ``refused`` system calls, ``max_fds`` a limit, ``sources`` the only ones that it may try, and ``more_flags``
    are others of the agent's.
    """

    name: str
    sees: Sees = Sees.ALL
    held: tuple[str, ...] | None = None
    mounts: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    max_fds: int | None = None
    sources: str = ""
    more_flags: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """What the agent's command line has for it."""
        return [*([f"--collector.source={self.sources}"] if self.sources else []), *self.more_flags]

    def build_prefix(self, stage: Path) -> list[str]:
        """The command that runs another one in this way.

        ``stage`` is a directory that everybody may enter, with the empty directories ``repository`` and ``packages``:
        what lies in root's home is mounted there, where a user without rights can read it. All programs are such as
        busybox has, too.
        """
        packages = next(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
        lines = [
            "set -e",
            f"STAGE={stage}",
            f"mount -o bind {ROOT} {stage}/repository",
            f"mount -o bind {packages} {stage}/packages",
            *self.mounts,
            f"cd {stage}/repository",
            f"export PYTHONPATH={stage}/packages PYTHONDONTWRITEBYTECODE=1",
            f'exec {shlex.join(self._wrap(stage))} "$@"',
        ]
        return ["unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join(lines), "sh"]

    def _wrap(self, stage: Path) -> list[str]:
        words = ["unshare", *self.namespaces] if self.namespaces else []
        if self.max_fds is not None:
            words += ["prlimit", f"--nofile={self.max_fds}:{self.max_fds}"]
        scripts = stage / "repository/tests"
        if self.refused:
            words += [PYTHON, "-I", str(scripts / "blind/refuse_syscalls.py"), ",".join(self.refused)]
        if self.held is not None:
            words += [PYTHON, "-I", str(scripts / "with_capabilities.py"), str(USER), ",".join(self.held)]
        return words or ["env"]


def without(*missing: str) -> tuple[str, ...]:
    return tuple(name for name in CAPABILITIES if name not in missing)


def hide_pids(mode: int) -> str:
    return f"mount -t proc -o hidepid={mode} proc /proc"


PROC_SUBSET: Final = "mount -t proc -o subset=pid proc /proc"
MASK_KALLSYMS: Final = "[ ! -e /proc/kallsyms ] || mount -o bind /dev/null /proc/kallsyms"
NO_KVM_DEVICE: Final = "mount -o bind /dev/null /dev/kvm"
NO_KVM_MODULE: Final = "mount -t tmpfs none /sys/module"
# Where the stage has types of a KVM that is laid out otherwise, or only vmlinux's.
OTHER_TYPES: Final = "mount -o bind $STAGE/btf /sys/kernel/btf"
BPF_ONLY: Final = ("CAP_BPF", "CAP_PERFMON")
NO_PTRACE: Final = without("CAP_SYS_PTRACE")

WAYS: Final = (
    Way(name="root"),
    Way(name="user with every capability", held=CAPABILITIES),
    Way(name="user without CAP_BPF", held=without("CAP_BPF", "CAP_SYS_ADMIN"), sees=Sees.SOME),
    Way(name="user without CAP_PERFMON", held=without("CAP_PERFMON", "CAP_SYS_ADMIN"), sees=Sees.SOME),
    Way(name="user without CAP_SYS_PTRACE", held=NO_PTRACE),
    Way(name="user without CAP_DAC_READ_SEARCH", held=without("CAP_DAC_READ_SEARCH")),
    Way(name="user without CAP_SYS_ADMIN", held=without("CAP_SYS_ADMIN")),
    Way(name="user with CAP_SYS_PTRACE only", held=("CAP_SYS_PTRACE",), sees=Sees.NONE),
    Way(name="user without any capability", held=(), sees=Sees.NONE),
    *(
        way
        for mode in (1, 2)
        for way in (
            Way(name=f"hidepid={mode}", mounts=(hide_pids(mode),)),
            Way(name=f"hidepid={mode}, no CAP_SYS_PTRACE", mounts=(hide_pids(mode),), held=NO_PTRACE, sees=Sees.NONE),
            Way(name=f"hidepid={mode}, no capability", mounts=(hide_pids(mode),), held=(), sees=Sees.NONE),
        )
    ),
    Way(name="ProcSubset=pid", mounts=(PROC_SUBSET,)),
    Way(name="ProcSubset=pid, no bpf", mounts=(PROC_SUBSET,), sources="stats_fd,debugfs", sees=Sees.NONE),
    Way(name="nothing mounted below /sys", mounts=(UNMOUNT_ALL,)),
    Way(name="nothing mounted, user", mounts=(UNMOUNT_ALL,), held=BPF_ONLY),
    Way(name="kallsyms masked", mounts=(MASK_KALLSYMS,)),
    Way(name="kallsyms masked, no bpf", mounts=(MASK_KALLSYMS,), sources="stats_fd", sees=Sees.NONE),
    Way(name="pid namespace", namespaces=("--pid", "--fork", "--mount-proc"), sees=Sees.NONE),
    Way(name="pid namespace, host's /proc", namespaces=("--pid", "--fork"), sees=Sees.ANY),
    Way(name="user namespace", namespaces=("--user", "--map-root-user"), sees=Sees.NONE),
    Way(name="seccomp: bpf", refused=("bpf",), sees=Sees.SOME),
    Way(name="seccomp: perf_event_open", refused=("perf_event_open",)),
    Way(name="seccomp: bpf, pidfd_getfd", refused=("bpf", "pidfd_getfd"), sees=Sees.ANY),
    Way(name="seccomp: bpf, pidfd_open", refused=("bpf", "pidfd_open"), sees=Sees.ANY),
    Way(name="seccomp: bpf, kcmp", refused=("bpf", "kcmp"), sees=Sees.ANY),
    Way(name="no /dev/kvm", mounts=(NO_KVM_DEVICE,)),
    Way(name="no /dev/kvm, no bpf", mounts=(NO_KVM_DEVICE,), sources="stats_fd,debugfs", sees=Sees.ANY),
    Way(name="no KVM to be seen", mounts=(NO_KVM_MODULE, NO_KVM_DEVICE), sees=Sees.SOME),
    Way(name="wrong layout", mounts=(OTHER_TYPES,), sees=Sees.SOME),
    Way(name="wrong layout, no stats_fd", mounts=(OTHER_TYPES,), sources="bpf", sees=Sees.NONE),
    Way(name="nothing mounted, no CAP_DAC_READ_SEARCH", mounts=(UNMOUNT_ALL,), held=without("CAP_DAC_READ_SEARCH")),
    Way(name="64 fds", max_fds=64),
    Way(name="20 fds", max_fds=20, sees=Sees.ANY),
    Way(name="20 fds, no bpf", max_fds=20, sources="stats_fd,debugfs", sees=Sees.ANY),
    Way(name="debugfs only", sources="debugfs", sees=Sees.ANY),
    Way(name="stats_fd only", sources="stats_fd", sees=Sees.SOME),
)
