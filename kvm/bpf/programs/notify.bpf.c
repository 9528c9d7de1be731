// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Watches handle_notify() of kvm_intel: nothing runs on any other exit.
 *
 * On entry a record goes to userspace, so that nobody has to poll counters; one in some seconds for each thread,
 * whatever a guest does: it can take a notify exit every few microseconds. On return, exits with an invalid VM context
 * are counted, each of them: handle_notify() then returns 0 with KVM_EXIT_NOTIFY and KVM_NOTIFY_CONTEXT_INVALID in the
 * vCPU's kvm_run, and the guest can never run on.
 *
 * These programs fit any function `int f(struct kvm_vcpu *)`.
 */
#include "kernel.bpf.h"
#include <bpf/bpf_tracing.h>

#define MAX_THREADS 16384
/* A record for which the ring has no room is tried again after so long. */
#define RETRY_NS 50000000ULL
/* include/uapi/linux/kvm.h: struct kvm_run */
#define RUN_EXIT_REASON 8
#define RUN_NOTIFY_FLAGS 32

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Lies in .bss, which userspace maps: `_CONTROL` in kvm/bpf/notify_trigger.py. */
struct control {
	__u64 again_ns;
	/* what counts on return: KVM_EXIT_NOTIFY, KVM_NOTIFY_CONTEXT_INVALID */
	__u32 exit_reason, flags;
	__u32 own_tgid, reserved;
	__u64 lost, uncounted;
};
struct control control;

struct record {
	__u64 time_ns;
	__u32 tgid, tid, vcpu_id, reserved;
};

struct vcpu_thread {
	__u64 start_boottime;
	__u32 tgid, tid, vcpu_id, reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* set by userspace */
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); /* set by userspace, by the number of CPUs */
	__type(key, __u32);
	__type(value, __u64);
} told_ns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_THREADS);
	__type(key, struct vcpu_thread);
	__type(value, __u64);
} invalid_exits SEC(".maps");

static __always_inline bool may_tell(__u32 tid, __u64 now)
{
	__u64 *told = bpf_map_lookup_elem(&told_ns, &tid);

	if (!told) {
		if (!bpf_map_update_elem(&told_ns, &tid, &now, BPF_ANY))
			return true;
		/* without its entry nothing would limit it */
		__sync_fetch_and_add(&control.lost, 1);
		return false;
	}
	if (now - *told < control.again_ns)
		return false;
	*told = now;
	return true;
}

SEC("fentry")
int BPF_PROG(on_entry, struct kvm_vcpu *vcpu)
{
	__u64 now = bpf_ktime_get_ns(), id = bpf_get_current_pid_tgid();
	struct record *record;
	__u32 tid = id;

	if (!may_tell(tid, now))
		return 0;
	record = bpf_ringbuf_reserve(&records, sizeof(*record), 0);
	if (!record) {
		now = now - control.again_ns + RETRY_NS;
		bpf_map_update_elem(&told_ns, &tid, &now, BPF_ANY);
		__sync_fetch_and_add(&control.lost, 1);
		return 0;
	}
	record->time_ns = now;
	record->tgid = id >> 32;
	record->tid = tid;
	record->vcpu_id = BPF_CORE_READ(vcpu, vcpu_id);
	record->reserved = 0;
	bpf_ringbuf_submit(record, 0);
	return 0;
}

SEC("fexit")
int BPF_PROG(on_return, struct kvm_vcpu *vcpu, int result)
{
	void *run = BPF_CORE_READ(vcpu, run);
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 id = bpf_get_current_pid_tgid(), one = 1, *count;
	struct vcpu_thread thread = {};
	__u32 exit_reason = 0, flags = 0;

	if (result)
		return 0;
	bpf_probe_read_kernel(&exit_reason, sizeof(exit_reason), run + RUN_EXIT_REASON);
	bpf_probe_read_kernel(&flags, sizeof(flags), run + RUN_NOTIFY_FLAGS);
	if (exit_reason != control.exit_reason || !(flags & control.flags))
		return 0;
	thread.start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
	thread.tgid = id >> 32;
	thread.tid = id;
	thread.vcpu_id = BPF_CORE_READ(vcpu, vcpu_id);
	count = bpf_map_lookup_elem(&invalid_exits, &thread);
	if (count)
		*count += 1; /* only this thread has this key */
	else if (bpf_map_update_elem(&invalid_exits, &thread, &one, BPF_NOEXIST))
		__sync_fetch_and_add(&control.uncounted, 1);
	return 0;
}

SEC("raw_tp")
int learn(void *ctx)
{
	control.own_tgid = bpf_get_current_pid_tgid() >> 32;
	return 0;
}
