/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Ways through the kernel's memory, each step checked: the list of VMs, a VM's vCPUs, a process's fds. */
#ifndef WALKS_BPF_H
#define WALKS_BPF_H

#include "records.bpf.h"

#define MAX_VCPUS_OF_VM 65536
/* A VMM has its VM's fd among its first; a process with more files must not hold up the others. */
#define MAX_PROCESS_FDS (1u << 16)
#define CHUNK 16
#define SEARCH_ROUNDS 64
#define LOWEST_POINTER 0x1000
#define NAME_BEGINS 0x2d6d766b /* "kvm-" */

/* ---- what a VM and a vCPU say of themselves ----------------------------------------------------------------------- */

static __always_inline int read_tid(const struct kvm_vcpu *vcpu)
{
	struct pid *pid = READ(vcpu, pid);

	return pid ? READ(pid, numbers[0].nr) : 0;
}

static __always_inline void read_notify(const struct kvm *kvm, __u32 *window, __u32 *flags, __u32 *known)
{
	*known = bpf_core_field_exists(kvm->arch.notify_vmexit_flags);
	if (*known) {
		*window = READ(kvm, arch.notify_window);
		*flags = READ(kvm, arch.notify_vmexit_flags);
	}
}

/* Our list node is the VM's as long as both neighbours say so; list_del() poisons the node's pointers. */
__noinline int is_listed(__u64 kvm)
{
	struct list_head node = {};
	unsigned long at = (unsigned long)FIELD(kvm, struct kvm, vm_list);

	if (bpf_probe_read_kernel(&node, sizeof(node), (void *)at))
		return false;
	return read_u64(&node.prev->next) == at && read_u64(&node.next->prev) == at;
}

/* struct kvm.stats_id begins with "kvm-" before the VM is put on the list. */
static __always_inline bool looks_like_vm(const void *kvm)
{
	__u32 begin = 0;

	bpf_probe_read_kernel(&begin, sizeof(begin), FIELD(kvm, struct kvm, stats_id));
	return begin == NAME_BEGINS;
}

/* ---- the vCPUs of a VM ---------------------------------------------------------------------------------------------- */

struct vcpu_walk {
	__u64 head, leaf;
	__u32 index, wanted_vcpu_id;
	__u64 vcpu;
};

static __always_inline bool is_node(__u64 entry)
{
	return (entry & 3) == 2 && entry > LOWEST_POINTER; /* xa_is_node() in include/linux/xarray.h */
}

/* 64, or 16 on small kernels */
#define SLOTS (bpf_core_field_size(struct xa_node, slots) / sizeof(void *))

/* Return what stands at walk->index, from the top of the tree down; note the leaf.
 *
 * A function that is not static is verified once, and not in each of the states in which it is called: of those that
 * are called in loops, the large ones are such. */
__noinline __u64 descend(struct vcpu_walk *walk)
{
	__u64 entry;

	if (!walk)
		return 0;
	entry = walk->head;
	if (!is_node(entry))
		return walk->index == 0 && !(entry & 3) ? entry : 0;
	for (int depth = 0; depth < 4; depth++) {
		__u64 node = entry - 2;
		__u8 shift = 0;

		bpf_probe_read_kernel(&shift, sizeof(shift), FIELD(node, struct xa_node, shift));
		if (shift > 30)
			return 0;
		entry = read_u64(FIELD(node, struct xa_node, slots) + 8 * ((walk->index >> shift) & (SLOTS - 1)));
		if (!shift) {
			walk->leaf = node;
			return entry & 3 ? 0 : entry;
		}
		if (!is_node(entry))
			return 0;
	}
	return 0;
}

/* Return the vCPU at walk->index, 0 if there is none; indexes are asked for in ascending order. */
static __always_inline __u64 find_vcpu(struct vcpu_walk *walk)
{
	__u64 entry;

	if (!walk->leaf || !(walk->index & (SLOTS - 1)))
		return descend(walk);
	entry = read_u64(FIELD(walk->leaf, struct xa_node, slots) + 8 * (walk->index & (SLOTS - 1)));
	return entry & 3 ? 0 : entry;
}

/* ---- the fd of a VM ------------------------------------------------------------------------------------------------- */

struct fd_walk {
	__u64 fds, kvm;
	__u32 max_fds;
	__s32 found;
};

__noinline int is_vm_file(__u64 file, __u64 kvm)
{
	return file && read_u64(FIELD(file, struct file, f_op)) == control.vm_fops &&
	       read_u64(FIELD(file, struct file, private_data)) == kvm;
}

static long find_in_chunk(__u32 index, struct fd_walk *walk)
{
	__u64 files[CHUNK];
	__u32 base = index * CHUNK;

	if (bpf_probe_read_kernel(files, sizeof(files), (void *)(walk->fds + 8 * (__u64)base)))
		return 1;
	for (int i = 0; i < CHUNK; i++) {
		if (base + i < walk->max_fds && is_vm_file(files[i], walk->kvm)) {
			walk->found = base + i;
			return 1;
		}
	}
	return 0;
}

/* Return the lowest fd at which a process holds a VM's file, -1 if it does not.
 *
 * What is known of it is looked at first. A VM whose file its process has closed would cost a search of all its fds in
 * each look, and a process can have many: that is searched for again after SEARCH_ROUNDS only. */
__noinline int find_vm_fd(__u64 files, __u64 kvm, struct owner *owner)
{
	struct fdtable *table = (void *)read_u64(FIELD(files, struct files_struct, fdt));
	struct fd_walk walk = { .kvm = kvm, .found = -1 };
	__s32 known;

	if (!owner)
		return -1;
	known = owner->vm_fd;
	walk.fds = (__u64)READ(table, fd);
	walk.max_fds = READ(table, max_fds);
	if (known >= 0 && known < walk.max_fds &&
	    is_vm_file(read_u64((void *)(walk.fds + 8 * (__u64)known)), kvm))
		return known;
	if (known < 0 && owner->searched && control.round - owner->searched < SEARCH_ROUNDS)
		return -1;
	if (walk.max_fds > MAX_PROCESS_FDS)
		walk.max_fds = MAX_PROCESS_FDS;
	bpf_loop((walk.max_fds + CHUNK - 1) / CHUNK, find_in_chunk, &walk, 0);
	control.slots += walk.found < 0 ? walk.max_fds : walk.found;
	owner->searched = walk.found < 0 ? control.round : 0;
	return walk.found;
}

/* ---- the list of VMs ------------------------------------------------------------------------------------------------ */

struct list_walk {
	__u64 node, before, wanted;
	bool ended;
};

static long step(struct list_walk *walk)
{
	struct list_head node = {};

	if (bpf_probe_read_kernel(&node, sizeof(node), (void *)walk->node) || (__u64)node.prev != walk->before)
		return 1; /* the list changed under us: `ended` stays false */
	walk->before = walk->node;
	walk->node = (__u64)node.next;
	return 0;
}

static __always_inline struct list_walk start_at_head(void)
{
	struct list_walk walk = { .before = control.vm_list };

	walk.node = read_u64((void *)control.vm_list);
	return walk;
}

#endif
