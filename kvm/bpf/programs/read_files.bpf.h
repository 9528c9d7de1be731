/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The slow and sure way: a part of vcpus.bpf.c, which says when it is gone. */
#ifndef READ_FILES_BPF_H
#define READ_FILES_BPF_H

#include "walks.bpf.h"

#define ANON_INODE_FS_MAGIC 0x09041934

enum kind { OTHER, VM, VCPU };

static __always_inline enum kind recognise(const struct file *file)
{
	char name[16] __attribute__((aligned(8))) = {};

	if (control.vcpu_fops) {
		__u64 f_op = (__u64)file->f_op;

		return f_op == control.vcpu_fops ? VCPU : f_op == control.vm_fops ? VM : OTHER;
	}
	if (file->f_inode->i_sb->s_magic != ANON_INODE_FS_MAGIC)
		return OTHER;
	bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(file, f_path.dentry, d_name.name));
	if (*(__u64 *)name == 0x757063762d6d766bULL && name[8] == ':') /* kvm-vcpu: */
		return VCPU;
	return (*(__u64 *)name & 0xffffffffffffffULL) == 0x6d762d6d766bULL ? VM : OTHER; /* kvm-vm and its NUL */
}

/* struct kvm_vcpu.stats_id lies behind the statistics and begins with "kvm-": if it does so where the types say, then
 * the statistics are where they say. */
static __always_inline bool looks_like_vcpu(const struct kvm_vcpu *vcpu)
{
	__u32 begin = 0;

	if (!bpf_core_field_exists(vcpu->stats_id))
		return false;
	bpf_probe_read_kernel(&begin, sizeof(begin), FIELD(vcpu, struct kvm_vcpu, stats_id));
	return begin == NAME_BEGINS;
}

SEC("iter/task_file")
int read_files(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct file_record record = {};
	struct kvm_vcpu *vcpu;
	struct kvm *kvm;
	enum kind kind;

	/* A process without memory is exiting, and closes its files one after the other: it holds no VM any more. */
	if (!task || !file || !task->mm)
		return 0;
	kind = recognise(file);
	if (kind == OTHER)
		return 0;
	record.is_vcpu = kind == VCPU;
	vcpu = file->private_data;
	kvm = kind == VCPU ? BPF_CORE_READ(vcpu, kvm) : file->private_data;
	record.kvm = (__u64)kvm;
	record.tgid = task->tgid;
	record.fd = ctx->fd;
	record.start_boottime = task->group_leader->start_boottime;
	record.is_owner = BPF_CORE_READ(kvm, mm) == task->mm;
	record.online_vcpus = BPF_CORE_READ(kvm, online_vcpus.counter);
	read_notify(kvm, &record.notify_window, &record.notify_vmexit_flags, &record.has_notify);
	if (kind == VCPU) {
		/* With nothing learnt there was no VM of ours to try the types with. */
		if (!control.vcpu_fops && !looks_like_vcpu(vcpu))
			control.strange++;
		record.vcpu_id = BPF_CORE_READ(vcpu, vcpu_id);
		record.tid = read_tid(vcpu);
		for (int i = 0; i < MAX_STATISTICS && i < control.statistics; i++)
			record.values[i] = read_u64(FIELD(vcpu, struct kvm_vcpu, stat) + control.stat_offsets[i]);
	}
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

#endif
