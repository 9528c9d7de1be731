/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What a VM of our own teaches: a part of vcpus.bpf.c. Run in our own process, while that VM is there. */
#ifndef LEARN_BPF_H
#define LEARN_BPF_H

#include "walks.bpf.h"

static __always_inline struct file *find_own_file(__u32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);

	return (void *)read_u64(BPF_CORE_READ(table, fd) + fd);
}

SEC("raw_tp")
int learn(void *ctx)
{
	struct file *vm_file = find_own_file(control.own_vm_fd);
	struct file *vcpu_file = find_own_file(control.own_vcpu_fd);
	struct kvm_vcpu *vcpu = BPF_CORE_READ(vcpu_file, private_data);

	control.own_tgid = bpf_get_current_pid_tgid() >> 32;
	if (bpf_core_field_exists(struct kvm_vcpu_stat, exits))
		control.exits_offset = bpf_core_field_offset(struct kvm_vcpu_stat, exits);
	if (bpf_core_field_exists(struct kvm_vcpu_stat, notify_window_exits))
		control.notify_window_exits_offset = bpf_core_field_offset(struct kvm_vcpu_stat, notify_window_exits);
	/* Without a VM of ours both fds are absurd numbers and nothing is found. */
	control.found = vcpu && BPF_CORE_READ(vcpu, kvm) == BPF_CORE_READ(vm_file, private_data);
	if (control.found) {
		control.vm_fops = (__u64)BPF_CORE_READ(vm_file, f_op);
		control.vcpu_fops = (__u64)BPF_CORE_READ(vcpu_file, f_op);
		control.wanted_vm = (__u64)BPF_CORE_READ(vcpu, kvm);
	}
	return 0;
}

static long step_to_head(__u32 index, struct list_walk *walk)
{
	if (!looks_like_vm((void *)(walk->node - bpf_core_field_offset(struct kvm, vm_list)))) {
		walk->ended = true;
		return 1;
	}
	return step(walk);
}

/* The head of the list has no name in /proc/kallsyms on many kernels; it is the one node that is part of no VM. */
SEC("raw_tp")
int learn_vm_list(void *ctx)
{
	struct list_walk walk = {};

	control.found = 0;
	if (!bpf_core_field_exists(struct kvm, vcpu_array))
		return 0;
	walk.node = (__u64)FIELD(control.wanted_vm, struct kvm, vm_list);
	walk.before = read_u64((void *)walk.node + bpf_core_field_offset(struct list_head, prev));
	bpf_loop(MAX_VMS, step_to_head, &walk, 0);
	if (walk.ended) {
		control.vm_list = walk.node;
		control.found = 1;
	}
	return 0;
}

#endif
