"""A refusal names its cause, whatever number the kernel gave for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvm.bpf.refusals import check_own_pid, explain, find_missing_capabilities, find_refusal
from kvm.errors import SourceUnavailable
from kvm.host.privileges import Privileges

ALL = 0x1FFFFFFFFFF
SYS_ADMIN, PERFMON, BPF = 1 << 21, 1 << 38, 1 << 39
EPERM = OSError(errno.EPERM, "Operation not permitted", "bpf_object__load")
EINVAL = OSError(errno.EINVAL, "Invalid argument", "bpf_object__load")
VERIFIER = """libbpf: prog 'read_vms': -- BEGIN PROG LOAD LOG --
0: R1=ctx(off=0,imm=0) R10=fp0
; int read_vms(struct bpf_iter__task *ctx)
5: (85) call unknown#195896080
invalid func unknown#195896080
processed 6 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
-- END PROG LOAD LOG --"""
FAILED = [
    "libbpf: map 'records': created successfully, fd=4",
    "libbpf: prog 'on_entry': BPF program load failed: Operation not permitted",
    "libbpf: permission error while running as root; try raising 'ulimit -l'? current value: 8.0 MiB",
    "libbpf: failed to load object 'notify'",
]


class Roots:
    """A host's /proc and /sys in a directory; all is well unless a test says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.sys = directory / "proc", directory / "sys"
        self.write("proc/self/status", f"CapEff:\t{ALL:016x}\nSeccomp:\t0\n")
        self.write("proc/self/uid_map", "         0          0 4294967295\n")
        self.write("sys/kernel/btf/vmlinux", "")
        self.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
        (self.sys / "module/kvm").mkdir(parents=True)

    def write(self, name: str, text: str) -> None:
        path = self.proc.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def explain(self, err: OSError, messages: list[str] | None = None, *, attaches: bool = False) -> str:
        found = explain(err, messages or [], self.proc, self.sys, attaches=attaches)
        assert found.remedy
        return found.reason


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path)


def test_no_types(roots: Roots) -> None:
    (roots.sys / "kernel/btf/vmlinux").unlink()
    assert roots.explain(EINVAL).startswith("the kernel describes no types of its own")


def test_lockdown(roots: Roots) -> None:
    roots.write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
    assert roots.explain(EINVAL, [VERIFIER]).startswith("lockdown=confidentiality")


def test_a_missing_capability(roots: Roots) -> None:
    roots.write("proc/self/status", f"CapEff:\t{BPF:016x}\n")
    assert roots.explain(EPERM) == "missing capability: CAP_PERFMON"


def test_where_kvm_is_a_module_attaching_takes_more(roots: Roots) -> None:
    roots.write("proc/self/status", f"CapEff:\t{BPF | PERFMON:016x}\n")
    roots.write("sys/module/kvm/initstate", "live\n")
    roots.write("sys/kernel/btf/kvm", "")
    wanted = "missing capability: CAP_SYS_ADMIN (while loading, because kvm is a module)"
    assert roots.explain(EINVAL, attaches=True) == wanted
    assert "capability" not in roots.explain(EINVAL)


def test_to_search_modules_for_a_function_takes_more(roots: Roots) -> None:
    """KVM is built in; libbpf looks for a function that vmlinux does not have."""
    messages = ["libbpf: loading kernel BTF '/sys/kernel/btf/vmlinux': 0", "libbpf: failed to iterate BTF objects: -1"]
    roots.write("proc/self/status", f"CapEff:\t{BPF | PERFMON:016x}\n")
    wanted = "missing capability: CAP_SYS_ADMIN (while loading, because modules are searched for the function)"
    assert roots.explain(EPERM, messages, attaches=True) == wanted
    roots.write("proc/self/status", f"CapEff:\t{ALL:016x}\n")
    assert "although no capability is missing" in roots.explain(EPERM, messages, attaches=True)


def test_a_module_without_types(roots: Roots) -> None:
    roots.write("sys/module/kvm/initstate", "live\n")
    assert roots.explain(EINVAL).startswith("the kvm module describes no types")


def test_a_user_namespace(roots: Roots) -> None:
    roots.write("proc/self/uid_map", "0 1000 1\n")
    assert roots.explain(EPERM) == "capabilities of a user namespace do not reach BPF"


def test_a_seccomp_filter(roots: Roots) -> None:
    roots.write("proc/self/status", f"CapEff:\t{ALL:016x}\nSeccomp:\t2\n")
    assert roots.explain(EPERM).endswith("perhaps a seccomp filter forbids bpf(2)")


def test_a_kernel_that_forbids_it_to_all(roots: Roots) -> None:
    reason = "prog 'on_entry': BPF program load failed: Operation not permitted, although no capability is missing"
    assert roots.explain(EPERM, FAILED) == reason


def test_the_verifier_is_quoted(roots: Roots) -> None:
    reason = "the kernel's verifier refused read_vms: invalid func unknown#195896080"
    assert roots.explain(EINVAL, [*FAILED[:1], VERIFIER]) == reason


def test_files_that_cannot_be_read_explain_nothing(tmp_path: Path, roots: Roots) -> None:
    found = explain(EINVAL, [], tmp_path / "nowhere", roots.sys)
    assert found.reason == "[Errno 22] Invalid argument: 'bpf_object__load'"


@pytest.mark.parametrize(
    ("held", "module", "missing"),
    [
        (ALL, True, ()),
        (SYS_ADMIN, True, ()),
        (BPF | PERFMON, False, ()),
        (PERFMON, False, ("CAP_BPF",)),
        (0, False, ("CAP_BPF", "CAP_PERFMON")),
    ],
)
def test_capabilities(held: int, module: bool, missing: tuple[str, ...]) -> None:
    types = "kvm is a module" if module else ""
    assert find_missing_capabilities(Privileges(uid=0, capabilities=held), types) == missing


def test_a_status_without_capabilities_accuses_nobody() -> None:
    assert find_missing_capabilities(Privileges(uid=0), "kvm is a module") == ()


def test_without_messages_there_is_no_refusal() -> None:
    assert find_refusal([]) == ""


def test_our_own_pid() -> None:
    check_own_pid(os.getpid())
    with pytest.raises(SourceUnavailable, match="pid namespace of its own") as refused:
        check_own_pid(os.getpid() + 1)
    assert "hostPID: true" in refused.value.remedy
