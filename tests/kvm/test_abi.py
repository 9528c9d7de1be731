"""The numbers of kvm/abi.py are those of the system's headers: the C compiler says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvm import abi

PERF_FLAGS = "(offsetof(struct perf_event_attr, read_format) + sizeof(__u64))"
# Name in kvm/abi.py and the same in C.
EXPRESSIONS = {
    **{
        name: name
        for name in """
        KVM_GET_API_VERSION KVM_CREATE_VM KVM_CHECK_EXTENSION KVM_GET_VCPU_MMAP_SIZE KVM_CREATE_VCPU KVM_GET_STATS_FD
        KVM_RUN KVM_SET_REGS KVM_ENABLE_CAP
        KVM_CAP_BINARY_STATS_FD KVM_CAP_X86_NOTIFY_VMEXIT KVM_EXIT_NOTIFY KVM_NOTIFY_CONTEXT_INVALID
        KVM_STATS_TYPE_MASK KVM_STATS_UNIT_MASK KVM_STATS_BASE_MASK
        EXIT_REASON_NOTIFY SYS_pidfd_open SYS_openat2 SYS_pidfd_getfd
        SYS_fsopen SYS_fsconfig SYS_fsmount FSOPEN_CLOEXEC FSCONFIG_CMD_CREATE FSMOUNT_CLOEXEC
        MOUNT_ATTR_RDONLY MOUNT_ATTR_NOSUID MOUNT_ATTR_NODEV MOUNT_ATTR_NOEXEC SYS_kcmp
        CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_SYS_PTRACE CAP_SYS_ADMIN CAP_PERFMON CAP_BPF
        CAP_CHOWN CAP_NET_BIND_SERVICE SYS_capget SYS_capset PR_CAPBSET_READ PR_CAPBSET_DROP PR_SET_NO_NEW_PRIVS
        SYS_perf_event_open PERF_TYPE_TRACEPOINT PERF_SAMPLE_TIME PERF_SAMPLE_RAW PERF_SAMPLE_IDENTIFIER
        PERF_FLAG_FD_CLOEXEC PERF_EVENT_IOC_REFRESH PERF_EVENT_IOC_SET_OUTPUT
        PERF_EVENT_IOC_SET_FILTER PERF_EVENT_IOC_ID PERF_RECORD_LOST PERF_RECORD_SAMPLE PERF_RECORD_LOST_SAMPLES
        KCMP_FILE NS_GET_USERNS RESOLVE_NO_MAGICLINKS RESOLVE_IN_ROOT NETLINK_KOBJECT_UEVENT
        """.split()
    },
    "LINUX_CAPABILITY_VERSION_3": "_LINUX_CAPABILITY_VERSION_3",
    "CAPABILITY_HEADER.size": "sizeof(struct __user_cap_header_struct)",
    "CAPABILITY_DATA.size": "_LINUX_CAPABILITY_U32S_3 * sizeof(struct __user_cap_data_struct)",
    "KVM_RUN_IMMEDIATE_EXIT": "offsetof(struct kvm_run, immediate_exit)",
    "KVM_ENABLE_CAP_ARGUMENT.size": "sizeof(struct kvm_enable_cap)",
    "KVM_REGS.size": "sizeof(struct kvm_regs)",
    "KVM_STATS_HEADER.size": "sizeof(struct kvm_stats_header)",
    "KVM_STATS_DESC.size": "sizeof(struct kvm_stats_desc)",
    "OPEN_HOW.size": "sizeof(struct open_how)",
    "PERF_EVENT_ATTR.size": "PERF_ATTR_SIZE_VER3",
    "PERF_EVENT_HEADER.size": "sizeof(struct perf_event_header)",
    "PERF_MMAP_DATA_HEAD": "offsetof(struct perf_event_mmap_page, data_head)",
    "PERF_MMAP_DATA_TAIL": "offsetof(struct perf_event_mmap_page, data_tail)",
    # A bit field has no offsetof: set it, and look at the word that follows read_format.
    **{
        f"PERF_ATTR_{bit.upper()}": f"*(__u64 *)((char *)&(struct perf_event_attr){{.{bit} = 1}} + {PERF_FLAGS})"
        for bit in ("disabled", "use_clockid")
    },
    "NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_ENABLED": "KVM_X86_NOTIFY_VMEXIT_ENABLED",
    "NotifyVmexitFlags.KVM_X86_NOTIFY_VMEXIT_USER": "KVM_X86_NOTIFY_VMEXIT_USER",
    **{f"KvmStatsType.{member.name}": member.name for member in abi.KvmStatsType},
    **{f"KvmStatsUnit.{member.name}": member.name for member in abi.KvmStatsUnit},
    **{f"KvmStatsBase.{member.name}": member.name for member in abi.KvmStatsBase},
}
# Only the kernel's own headers have these, or headers later than Debian 12's: each is shown true by another test.
NOT_IN_HEADERS = {
    "KVM_X86_TDX_VM",
    "VMX_EXIT_REASONS_SGX_ENCLAVE_MODE",
    "NOTIFY_VM_CONTEXT_INVALID",
    "KOBJECT_UEVENT_GROUP_KERNEL",
    "PROC_PID_INIT_INO",
    "PROC_USER_INIT_INO",
    "PIDFD_THREAD",
    "USER_HZ",
    "KVM_ISA_VMX",
}
FIELDS = {
    "KVM_ENABLE_CAP_ARGUMENT": ("struct kvm_enable_cap", ["cap", "flags", "args"]),
    "KVM_REGS": (
        "struct kvm_regs",
        [*"rax rbx rcx rdx rsi rdi rsp rbp".split(), *(f"r{n}" for n in range(8, 16)), "rip", "rflags"],
    ),
    "KVM_STATS_HEADER": (
        "struct kvm_stats_header",
        ["flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset"],
    ),
    "KVM_STATS_DESC": ("struct kvm_stats_desc", ["flags", "exponent", "size", "offset", "bucket_size"]),
    "OPEN_HOW": ("struct open_how", ["flags", "mode", "resolve"]),
    "PERF_EVENT_HEADER": ("struct perf_event_header", ["type", "misc", "size"]),
    "PERF_EVENT_ATTR": (
        "struct perf_event_attr",
        [
            *("type", "size", "config", "sample_period", "sample_type", "read_format", PERF_FLAGS, "wakeup_events"),
            *(
                "bp_type",
                "config1",
                "config2",
                "branch_sample_type",
                "sample_regs_user",
                "sample_stack_user",
                "clockid",
            ),
        ],
    ),
}
HEADERS = """
#include <stddef.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <linux/kvm.h>
#include <asm/vmx.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/kcmp.h>
#include <linux/mount.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/prctl.h>
"""


def compile_and_run(directory: Path, expressions: list[str]) -> list[int]:
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({expression}));\n' for expression in expressions)
    source = directory / "numbers.c"
    source.write_text(f"{HEADERS}\nint main(void) {{\n{lines}return 0;\n}}\n")
    subprocess.run(["cc", "-o", str(directory / "numbers"), str(source)], check=True)
    run = subprocess.run([str(directory / "numbers")], capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]


def lookup(path: str) -> int:
    value: object = abi
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, int)
    return value


def test_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    numbers = compile_and_run(tmp_path, list(EXPRESSIONS.values()))
    assert {name: lookup(name) for name in EXPRESSIONS} == dict(zip(EXPRESSIONS, numbers, strict=True))


@pytest.mark.parametrize("name", FIELDS)
def test_fields_stand_where_the_headers_put_them(name: str, tmp_path: Path) -> None:
    struct_name, fields = FIELDS[name]
    layout = getattr(abi, name)
    expressions = [f"offsetof({struct_name}, {field})" if field.isidentifier() else field for field in fields]
    offsets = compile_and_run(tmp_path, expressions)
    blank = bytearray(layout.size)
    ours = []
    for position in range(len(fields)):
        layout.pack_into(blank, 0, *(1 if at == position else 0 for at in range(len(fields))))
        ours.append(blank.index(1))  # little-endian: the first byte of the field that is set
    assert ours == offsets


def test_every_number_is_compared_or_listed() -> None:
    plain = {name for name, value in vars(abi).items() if isinstance(value, int) and not name.startswith("_")}
    assert plain <= set(EXPRESSIONS) | NOT_IN_HEADERS
