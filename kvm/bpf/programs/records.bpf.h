/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What vcpus.bpf.c and userspace say to each other: kvm/bpf/vcpu_programs.py and vcpu_decode.py know these layouts. */
#ifndef RECORDS_BPF_H
#define RECORDS_BPF_H

#include "kernel.bpf.h"

#define MAX_STATISTICS 16
#define MAX_VMS 16384
#define STATISTICS_BYTES 4096
#define MAX_WORDS 512 /* a power of two, as is the next */
#define MAX_TO_ADD 64

/* Lies in .bss, which userspace maps: `Control` in bpf_object.py. */
struct control {
	/* set by userspace before the first read */
	__u64 vm_fops, vcpu_fops, vm_list;
	__u32 statistics, vcpu_capacity;
	__u32 stat_offsets[MAX_STATISTICS];
	/* set by userspace before `learn` and before `read_vcpu` */
	__u32 own_vm_fd, own_vcpu_fd;
	__u64 wanted_vm;
	__u32 wanted_vcpu_id, wanted_bytes;
	/* answers of `learn`, `learn_vm_list` and `read_vcpu` */
	__u32 own_tgid, found;
	__u32 exits_offset, notify_window_exits_offset;
	/* answers of a read */
	__u32 round, vms, vcpus, broken;
	__u32 next_vm, unowned;
	/* how many slots of fd tables were looked at in this read, and how many files called a vCPU's led to none */
	__u32 slots, strange;
	/* set by userspace where more statistics are wanted, else 0: how many values of a VM, of all its vCPUs summed and
	 * of each vCPU; where the vCPUs' values begin; and how many bytes of the kernel's structs hold them */
	__u32 vm_words, sum_words, vcpu_words, vcpu_values;
	__u32 vm_stat_bytes, vcpu_stat_bytes;
	/* which 64-bit words of struct kvm_vm_stat, and after them which of struct kvm_vcpu_stat */
	__u32 wanted_words[MAX_WORDS];
	/* the values of the VM that is being read, in that order */
	__u64 row[MAX_WORDS];
	/* its vCPUs' statistics that are still to be added to them */
	__u64 to_add[MAX_TO_ADD];
	__u32 adding, reserved;
};
struct control control;

struct vm {
	__u64 kvm, mm, start_boottime;
	__u32 tgid;
	__s32 vm_fd;
	__u32 first, count;
	__u32 notify_window, notify_vmexit_flags;
	__u32 next, has_notify;
	__u32 missing, reserved;
};

struct vcpu_identity {
	__u32 vcpu_id;
	__s32 tid;
};

struct unowned {
	__u32 round, first;
	__u64 files; /* the fd table that was searched last: threads share one */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_VMS);
	__type(key, __u32);
	__type(value, struct vm);
} vms SEC(".maps");

/* The sizes of maps of one entry are set by userspace; of the next two: the number of vCPUs, and that times the number
 * of statistics. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct vcpu_identity);
} vcpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} values SEC(".maps");

/* A row for each VM, its own values and then the sums, and after all rows a column for each of the vCPUs' values. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} stat_values SEC(".maps");

/* The statistics of the VM or vCPU that is being read, as they stand in the kernel's memory. */
struct raw_statistics {
	__u64 words[STATISTICS_BYTES / sizeof(__u64)];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct raw_statistics);
} raw_statistics SEC(".maps");

/* From kvm->mm to the first VM of that memory that has no known owner in this round; others follow by vm.next. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct unowned);
} unowned_vms SEC(".maps");

/* Who a VM's owner was in the last look, and where its file: to check that takes less than to find it. */
struct owner {
	__u64 task, start_boottime;
	__u32 tgid;
	__s32 vm_fd;
	__u32 searched, reserved; /* the round in which vm_fd was searched for in vain, 0 if never */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct owner);
} owners SEC(".maps");

#define NOT_KNOWN 0xffffffff /* of a field that this kernel's structs do not have */

struct vcpu_state {
	__u64 regs[16];
	__u64 rip, regs_avail;
	__u32 vcpu_id;
	__s32 tid;
	__u32 guest_state_protected, vm_type;
	__u8 statistics[STATISTICS_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct vcpu_state);
} vcpu_state SEC(".maps");

/* What read_files writes; only struct vcpu_state and this have places for values in them. */
struct file_record {
	__u64 kvm, start_boottime;
	__u32 tgid, fd;
	__u32 is_vcpu, is_owner;
	__u32 notify_window, notify_vmexit_flags, has_notify;
	__u32 vcpu_id;
	__s32 tid;
	__u32 online_vcpus;
	__u64 values[MAX_STATISTICS];
};

#endif
