"""Says why the kernel refused a perf event, and what a person can do about it. Pure."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kvm.errors import KvmReadError, SourceUnavailable, VmGone
from kvm.host.privileges import Privileges


def explain(err: OSError, tid: int, privileges: Privileges) -> KvmReadError:
    """Make VmGone of an error that says the thread has ended, and SourceUnavailable of any other."""
    if err.errno == errno.ESRCH:
        return VmGone(f"thread {tid} has ended")
    if err.errno in (errno.EPERM, errno.EACCES):
        return explain_denial(err, privileges)
    reasons: dict[int | None, tuple[str, str]] = {
        errno.ENOSYS: ("this kernel has no perf events", "use a kernel with CONFIG_PERF_EVENTS"),
        errno.EINVAL: (f"{err}: the kernel does not know the tracepoint any more; was kvm loaded anew just now?", ""),
        errno.EMFILE: (f"{err}", "raise the service's limit of open files (LimitNOFILE=)"),
    }
    return SourceUnavailable(*reasons.get(err.errno, (str(err), "")))


def explain_denial(err: OSError, privileges: Privileges) -> SourceUnavailable:
    """Say who forbade it: perf_event_open(2) has one errno for many causes, so each is checked again."""
    causes: tuple[tuple[Callable[[], bool], str, str], ...] = (
        (
            lambda: privileges.lacks("CAP_PERFMON"),
            "missing capability: CAP_PERFMON",
            "give it to the service or the container",
        ),
        # Debian's patch: "Disallow perf_event_open() for unprivileged users" knows no CAP_PERFMON.
        (
            lambda: (privileges.perf_event_paranoid or 0) >= 3 and privileges.lacks("CAP_SYS_ADMIN"),
            "kernel.perf_event_paranoid is 3 or more: tracing takes CAP_SYS_ADMIN",
            "sysctl kernel.perf_event_paranoid=2, or give CAP_SYS_ADMIN",
        ),
        (
            lambda: privileges.initial_user_namespace is False,
            "capabilities of a user namespace do not reach perf events",
            "run in the host's user namespace",
        ),
        (
            lambda: err.filename == "mmap",
            f"{err}: kernel.perf_event_mlock_kb is used up",
            "raise kernel.perf_event_mlock_kb or give CAP_IPC_LOCK",
        ),
        (
            lambda: privileges.selinux_enforcing,
            f"{err}: SELinux may forbid perf_event to {privileges.label}",
            "allow it in the policy",
        ),
    )
    for holds, reason, remedy in causes:
        if holds():
            return SourceUnavailable(reason, remedy)
    if privileges.is_seccomp_filtered:
        return SourceUnavailable(
            f"{err}: perhaps a seccomp filter forbids perf_event_open(2)", "let the service call it"
        )
    return SourceUnavailable(
        f"{err}, although no capability is missing",
        "ask who set this host up: a security module or the kernel itself forbids it",
    )
