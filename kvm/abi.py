"""Layouts and numbers of the kernel's interfaces, named as in the headers; no logic and no I/O.

``tests/kvm/test_abi.py`` compares every number here with the system's own headers through the C compiler. x86-64 only:
that is where notify VM exits exist.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

# include/uapi/linux/kvm.h --------------------------------------------------------------------------------------------
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_ENABLE_CAP = 0x4068AEA3
KVM_GET_STATS_FD = 0xAECE

KVM_CAP_BINARY_STATS_FD = 203
# Linux kernel commit 2f4073e08f4c "KVM: VMX: Enable Notify VM exit" (in v6.0)
KVM_CAP_X86_NOTIFY_VMEXIT = 219


class NotifyVmexitFlags(IntFlag):
    """KVM_X86_NOTIFY_VMEXIT_*: the flags that a VMM passes with KVM_CAP_X86_NOTIFY_VMEXIT."""

    KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
    KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1


KVM_EXIT_NOTIFY = 37
KVM_NOTIFY_CONTEXT_INVALID = 1 << 0

# struct kvm_enable_cap without what is 0: cap, flags, args[0]
KVM_ENABLE_CAP_ARGUMENT = struct.Struct("=2IQ88x")
# struct kvm_regs: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags
KVM_REGS = struct.Struct("=18Q")
KVM_RUN_IMMEDIATE_EXIT = 1  # where in struct kvm_run

# struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
KVM_STATS_HEADER = struct.Struct("=6I")
# struct kvm_stats_desc without its name: flags, exponent, size, offset, bucket_size; name_size bytes of name follow
KVM_STATS_DESC = struct.Struct("=IhHII")


class KvmStatsType(IntEnum):
    """KVM_STATS_TYPE_*: bits 0 to 3 of kvm_stats_desc.flags."""

    KVM_STATS_TYPE_CUMULATIVE = 0
    KVM_STATS_TYPE_INSTANT = 1
    KVM_STATS_TYPE_PEAK = 2
    KVM_STATS_TYPE_LINEAR_HIST = 3
    KVM_STATS_TYPE_LOG_HIST = 4


KVM_STATS_TYPE_MASK = 0xF


class KvmStatsUnit(IntEnum):
    """KVM_STATS_UNIT_*: bits 4 to 7 of kvm_stats_desc.flags."""

    KVM_STATS_UNIT_NONE = 0x00
    KVM_STATS_UNIT_BYTES = 0x10
    KVM_STATS_UNIT_SECONDS = 0x20
    KVM_STATS_UNIT_CYCLES = 0x30
    KVM_STATS_UNIT_BOOLEAN = 0x40


KVM_STATS_UNIT_MASK = 0xF0


class KvmStatsBase(IntEnum):
    """KVM_STATS_BASE_*: bits 8 to 11 of kvm_stats_desc.flags."""

    KVM_STATS_BASE_POW10 = 0x000
    KVM_STATS_BASE_POW2 = 0x100


KVM_STATS_BASE_MASK = 0xF00

# arch/x86/include/uapi/asm/kvm.h: struct kvm.arch.vm_type, Linux 6.16
KVM_X86_TDX_VM = 5

# arch/x86/include/uapi/asm/vmx.h and arch/x86/include/asm/vmx.h ------------------------------------------------------
EXIT_REASON_NOTIFY = 75
VMX_EXIT_REASONS_SGX_ENCLAVE_MODE = 1 << 27  # arch/x86/include/asm/vmx.h; no header of userspace has it
NOTIFY_VM_CONTEXT_INVALID = 1 << 0  # arch/x86/include/asm/vmx.h; no header of userspace has it

# arch/x86/kvm/trace.h: the field isa of kvm:kvm_exit
KVM_ISA_VMX = 1

# arch/x86/include/asm/unistd_64.h ------------------------------------------------------------------------------------
SYS_pidfd_open = 434
SYS_fsopen = 430
SYS_fsconfig = 431
SYS_fsmount = 432
SYS_openat2 = 437
SYS_pidfd_getfd = 438
SYS_kcmp = 312
SYS_capget = 125
SYS_capset = 126
SYS_perf_event_open = 298

# include/uapi/linux/pidfd.h: Linux 6.9; older kernels answer EINVAL
PIDFD_THREAD = 0o200

# include/uapi/linux/kcmp.h: enum kcmp_type
KCMP_FILE = 0

# include/uapi/linux/mount.h
FSOPEN_CLOEXEC = 0x1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 0x1
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8

# include/uapi/linux/openat2.h: struct open_how: flags, mode, resolve
OPEN_HOW = struct.Struct("=3Q")
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

# include/uapi/linux/perf_event.h -------------------------------------------------------------------------------------
# struct perf_event_attr as far as PERF_ATTR_SIZE_VER3, which every kernel since 4.1 takes: type, size, config,
# sample_period, sample_type, read_format, the flags below, wakeup_events, bp_type, config1, config2,
# branch_sample_type, sample_regs_user, sample_stack_user, clockid
PERF_EVENT_ATTR = struct.Struct("=2I5Q2I4QIi")
PERF_TYPE_TRACEPOINT = 2
PERF_SAMPLE_TIME = 1 << 2
PERF_SAMPLE_RAW = 1 << 10
PERF_SAMPLE_IDENTIFIER = 1 << 16
# The bit fields of struct perf_event_attr, as bits of the 64-bit word that they share.
PERF_ATTR_DISABLED = 1 << 0
PERF_ATTR_USE_CLOCKID = 1 << 25
PERF_FLAG_FD_CLOEXEC = 8

PERF_EVENT_IOC_REFRESH = 0x2402
PERF_EVENT_IOC_SET_OUTPUT = 0x2405
PERF_EVENT_IOC_SET_FILTER = 0x40082406
PERF_EVENT_IOC_ID = 0x80082407

# struct perf_event_mmap_page: data_head, data_tail, data_offset, data_size stand together
PERF_MMAP_DATA_HEAD = 1024
PERF_MMAP_DATA_TAIL = 1032
PERF_MMAP_DATA = struct.Struct("4Q")
# struct perf_event_header: type, misc, size (of the record with this header)
PERF_EVENT_HEADER = struct.Struct("=I2H")
PERF_RECORD_LOST = 2
PERF_RECORD_SAMPLE = 9
PERF_RECORD_LOST_SAMPLES = 13
# A sample with PERF_SAMPLE_IDENTIFIER, _TIME and _RAW: id, time, bytes of raw data; these follow
PERF_SAMPLE = struct.Struct("=2QI")
# After the header of PERF_RECORD_LOST: id, lost; of PERF_RECORD_LOST_SAMPLES: lost
PERF_LOST = struct.Struct("=2Q")
PERF_LOST_SAMPLES = struct.Struct("=Q")

# include/uapi/linux/netlink.h, lib/kobject_uevent.c ------------------------------------------------------------------
NETLINK_KOBJECT_UEVENT = 15
KOBJECT_UEVENT_GROUP_KERNEL = 1

# include/uapi/linux/capability.h: the capabilities that the sources need, and those that listening may need
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_NET_BIND_SERVICE = 10
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39
# struct __user_cap_header_struct: version, pid; then two of struct __user_cap_data_struct: 32 bits each of the
# effective, permitted and inheritable ones
CAPABILITY_HEADER = struct.Struct("=Ii")
CAPABILITY_DATA = struct.Struct("=6I")
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# include/uapi/linux/prctl.h
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38

# include/linux/proc_ns.h (uapi/linux/nsfs.h since 6.18): the inodes of the initial pid and user namespaces
PROC_PID_INIT_INO = 0xEFFFFFFC
PROC_USER_INIT_INO = 0xEFFFFFFD

# include/uapi/linux/nsfs.h
NS_GET_USERNS = 0xB701

# fs/proc/array.c prints start_time in USER_HZ (include/asm-generic/param.h) for every architecture that has KVM
USER_HZ = 100
