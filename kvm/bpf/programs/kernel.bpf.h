/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The few structs of the kernel that our BPF programs look into, with the few fields they use: no vmlinux.h.
 *
 * preserve_access_index makes libbpf put in, at load time, where a field stands in the running kernel and in its kvm
 * module. A field that some kernel lacks is asked for with bpf_core_field_exists() before it is used.
 */
#ifndef KERNEL_BPF_H
#define KERNEL_BPF_H

#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct list_head {
	struct list_head *next, *prev;
};

struct mm_struct;
struct file_operations;

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct super_block {
	unsigned long s_magic;
};

struct inode {
	struct super_block *i_sb;
};

struct file {
	const struct file_operations *f_op;
	void *private_data;
	struct inode *f_inode;
	struct path f_path;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct task_struct {
	int pid, tgid;
	unsigned int flags;
	__u64 start_boottime;
	struct task_struct *group_leader;
	struct mm_struct *mm;
	struct files_struct *files;
};

struct upid {
	int nr;
};

struct pid {
	struct upid numbers[1];
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 seq_num;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

/* A vCPU's place in struct kvm is an xarray since Linux kernel commit c5b077549136 "KVM: Convert the kvm->vcpus array
 * to a xarray" (in v5.17); bpf_loop() is as old. */
struct xa_node {
	unsigned char shift;
	void *slots[1];
};

struct xarray {
	void *xa_head;
};

typedef struct {
	int counter;
} atomic_t;

/* vm_type was an unsigned long before it was a byte: its lowest byte comes first. */
struct kvm_arch {
	unsigned char vm_type;
	__u32 notify_window, notify_vmexit_flags;
};

/* Its fields are known by the kernel's descriptors only. */
struct kvm_vm_stat {
};

struct kvm {
	struct mm_struct *mm;
	struct list_head vm_list;
	struct xarray vcpu_array;
	atomic_t online_vcpus;
	struct kvm_arch arch;
	struct kvm_vm_stat stat;
	char stats_id[48];
};

/* Linux 7.x has taken RIP out of the array of general registers: `regs` has 16 elements there, and `rip` is a field. */
struct kvm_vcpu_arch {
	unsigned long regs[16];
	unsigned long rip;
	__u32 regs_avail;
	bool guest_state_protected;
};

/* ... and this field is a bitmap there; the part of a type's name after three underscores is for us alone. */
struct kvm_vcpu_arch___bitmap {
	unsigned long regs_avail[1];
};

struct kvm_vcpu___bitmap {
	struct kvm_vcpu_arch___bitmap arch;
};

struct kvm_vcpu_stat {
	__u64 exits, notify_window_exits;
};

struct kvm_run;

struct kvm_vcpu {
	struct kvm *kvm;
	int vcpu_id;
	struct kvm_run *run;
	struct pid *pid;
	struct kvm_vcpu_arch arch;
	struct kvm_vcpu_stat stat;
	char stats_id[48];
};

#pragma clang attribute pop

/* The beginning of a field's address, for reads of sizes that only the running kernel knows. */
#define FIELD(pointer, type, field) ((void *)((unsigned long)(pointer) + bpf_core_field_offset(type, field)))

/* Read a number of the kernel's memory; 0 where there is none.
 *
 * DIRECT_LOADS makes it one instruction, whose fault the kernel handles: the address is cast to read-only memory that is
 * not to be trusted, which Linux 6.18 allows and 6.12 does not. The CPU then fetches several cache lines at once, where it
 * waits for each in the helper: half the time for a host's vCPUs. */
#ifdef DIRECT_LOADS
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym;
#define LOAD(type, at) (*(type const volatile *)bpf_rdonly_cast((const void *)(at), 0))
#else
#define LOAD(type, at)                                                          \
	({                                                                      \
		type loaded = 0;                                                \
		bpf_probe_read_kernel(&loaded, sizeof(loaded), (const void *)(at)); \
		loaded;                                                         \
	})
#endif

/* Read a field of a struct of the kernel's that is a number or a pointer; the comma takes a const from its type. */
#define READ(pointer, field) \
	LOAD(typeof(((void)0, (pointer)->field)), __builtin_preserve_access_index(&(pointer)->field))

static __always_inline __u64 read_u64(const void *at)
{
	return LOAD(__u64, at);
}

#endif
