// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Every VM and every vCPU of the host, in a few calls.
 *
 * list_vms walks KVM's own list of VMs; read_batch reads VMs by the array of their vCPUs. So nothing is paid for the
 * files and threads that a host has besides. The list is meant to be walked with a mutex held, which BPF cannot take;
 * instead each step is checked: every node must lead back to where we came from, and a VM counts only if it is on the
 * list before and after its vCPUs were read. KVM takes a VM off the list before it frees anything of it
 * (kvm_destroy_vm in virt/kvm/kvm_main.c), so what passes was alive all the while.
 *
 * A VM belongs to the process whose memory it runs (kvm->mm). find_owners finds it by visiting the tasks of the host,
 * the thread-group leader first, or where the leader has exited the first thread that lives. From then on the owner is
 * only checked: 20,000 threads cost 10 ms to visit, more than 10,000 vCPUs to read.
 *
 * read_files is the slow and sure way: every open file of every process, held by a reference while we look. It serves
 * hosts without /dev/kvm, kernels that refuse the list, and VMs whose own process has ended while another
 * holds their files.
 *
 * A file is KVM's if its f_op is KVM's own, learnt from a VM that our own process makes for that purpose. A name alone
 * proves nothing: anybody can make a FIFO called `kvm-vcpu:0`. Where nothing could be learnt, the name counts only in
 * the file system of anonymous inodes, where users cannot name anything.
 */
#include "walks.bpf.h"
#include "statistics.bpf.h"
#include "learn.bpf.h"
#include "read_files.bpf.h"

#define NO_VM 0xffffffff
#define BATCH_VCPUS 512
#define BATCH_VMS 256
/* Some 30 ms. */
#define BATCH_SLOTS (1u << 20)

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Copy the wanted statistics of a vCPU to the columns; not static, so that its loop is verified once. */
__noinline int copy_statistics(__u64 statistics, __u32 at)
{
	for (int i = 0; i < MAX_STATISTICS && i < control.statistics; i++) {
		__u64 *value = bpf_map_lookup_elem(&values, &at);

		if (value)
			*value = read_u64((void *)(statistics + control.stat_offsets[i]));
		at += control.vcpu_capacity;
	}
	return 0;
}

static long read_one_vcpu(__u32 index, struct vcpu_walk *walk)
{
	struct kvm_vcpu *vcpu;
	struct vcpu_identity *identity;
	__u32 at = control.vcpus;

	walk->index = index;
	vcpu = (void *)find_vcpu(walk);
	if ((__u64)vcpu < LOWEST_POINTER)
		return 0;
	control.vcpus = at + 1;
	identity = bpf_map_lookup_elem(&vcpus, &at);
	if (!identity)
		return 0; /* userspace sees by control.vcpus that it needs more room */
	identity->vcpu_id = READ(vcpu, vcpu_id);
	identity->tid = read_tid(vcpu);
	copy_statistics((__u64)FIELD(vcpu, struct kvm_vcpu, stat), at);
	if (control.vcpu_stat_bytes)
		pick_vcpu_statistics((__u64)FIELD(vcpu, struct kvm_vcpu, stat), at);
	return 0;
}

static long list_one_vm(__u32 index, struct list_walk *walk)
{
	struct kvm *kvm = (void *)(walk->node - bpf_core_field_offset(struct kvm, vm_list));
	struct vm *vm;

	if (walk->node == control.vm_list) {
		walk->ended = true;
		return 1;
	}
	vm = bpf_map_lookup_elem(&vms, &index);
	if (step(walk) || !vm)
		return 1;
	control.vms = index + 1;
	vm->kvm = (__u64)kvm;
	vm->mm = (__u64)READ(kvm, mm);
	vm->tgid = vm->count = vm->first = vm->missing = 0;
	return 0;
}

SEC("raw_tp")
int list_vms(void *ctx)
{
	struct list_walk walk = start_at_head();

	bpf_loop(MAX_VMS + 1, list_one_vm, &walk, 0);
	control.broken = !walk.ended;
	return 0;
}

static __always_inline __u64 read_files_of(const struct owner *owner)
{
	return read_u64(FIELD(owner->task, struct task_struct, files));
}

/* Read a VM of this owner, with its vCPUs unless only the owner is another. */
static __always_inline void read_vm(struct vm *vm, __u32 vm_index, struct owner *owner)
{
	struct kvm *kvm = (void *)vm->kvm;
	struct vcpu_walk walk = {};
	__u64 files = read_files_of(owner);
	__u32 first = control.vcpus, online;

	if (!files || !is_listed(vm->kvm) || (__u64)READ(kvm, mm) != vm->mm)
		return;
	owner->vm_fd = find_vm_fd(files, vm->kvm, owner);
	online = READ(kvm, online_vcpus.counter);
	/* A VM that is being made is listed before its process has got the fd; and an exiting task gives up its files
	 * before any is closed, so that what was not found in them proves nothing. */
	if (owner->vm_fd < 0 && (!online || read_files_of(owner) != files))
		return;
	if (!vm->tgid) {
		if (control.vm_words + control.sum_words)
			begin_row(vm->kvm);
		walk.head = (__u64)READ(kvm, vcpu_array.xa_head);
		if (online && online <= MAX_VCPUS_OF_VM)
			bpf_loop(online, read_one_vcpu, &walk, 0);
		if (control.vm_words + control.sum_words)
			store_row(vm_index);
		read_notify(kvm, &vm->notify_window, &vm->notify_vmexit_flags, &vm->has_notify);
		if (!is_listed(vm->kvm)) {
			control.vcpus = first;
			return;
		}
		vm->first = first;
		vm->count = control.vcpus - first;
		vm->missing = online - vm->count;
	}
	vm->vm_fd = owner->vm_fd;
	vm->start_boottime = owner->start_boottime;
	vm->tgid = owner->tgid;
}

/* A task that has ended has no memory; one in its place has another. */
static __always_inline bool is_owner_still(const struct owner *owner, __u64 mm)
{
	struct task_struct *task = (void *)owner->task;
	struct task_struct *leader = READ(task, group_leader);

	return (__u64)READ(task, mm) == mm && READ(task, tgid) == owner->tgid &&
	       READ(leader, start_boottime) == owner->start_boottime;
}

static __always_inline void note_unowned(struct vm *vm, __u32 index)
{
	struct unowned new = { .round = control.round, .first = index }, *unowned;

	control.unowned++;
	vm->next = NO_VM;
	unowned = bpf_map_lookup_elem(&unowned_vms, &vm->mm);
	if (unowned && unowned->round == control.round)
		vm->next = unowned->first;
	bpf_map_update_elem(&unowned_vms, &vm->mm, &new, BPF_ANY);
}

struct batch {
	__u32 vcpus_before, slots_before;
};

static long read_next_vm(__u32 count, const struct batch *batch)
{
	__u32 index = control.next_vm;
	struct vm *vm = bpf_map_lookup_elem(&vms, &index);
	struct owner *known, owner;

	if (index >= control.vms || !vm || control.vcpus - batch->vcpus_before >= BATCH_VCPUS ||
	    control.slots - batch->slots_before >= BATCH_SLOTS)
		return 1;
	control.next_vm = index + 1;
	known = bpf_map_lookup_elem(&owners, &vm->kvm);
	if (known && is_owner_still(known, vm->mm)) {
		owner = *known;
		read_vm(vm, index, &owner);
		if (vm->tgid) {
			known->vm_fd = owner.vm_fd;
			known->searched = owner.searched;
		}
	}
	if (!vm->tgid)
		note_unowned(vm, index);
	return 0;
}

/* Nothing else runs on this CPU meanwhile (bpf_prog_test_run_raw_tp in net/bpf/test_run.c), so a host is read in
 * batches: userspace calls until control.next_vm is control.vms. */
SEC("raw_tp")
int read_batch(void *ctx)
{
	struct batch batch = { .vcpus_before = control.vcpus, .slots_before = control.slots };

	bpf_loop(BATCH_VMS, read_next_vm, &batch, 0);
	return 0;
}

struct visit {
	struct owner owner;
	__u32 index, slots_before;
};

static long visit_vm(__u32 count, struct visit *visit)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &visit->index);
	struct owner owner = visit->owner;

	if (!vm || control.slots - visit->slots_before >= BATCH_SLOTS)
		return 1; /* the next look finds the rest */
	/* A child between vfork() and exec() has the same memory: the process that started first is the owner. */
	if (!vm->tgid || (vm->tgid != owner.tgid && owner.start_boottime < vm->start_boottime)) {
		read_vm(vm, visit->index, &owner);
		if (vm->tgid == owner.tgid)
			bpf_map_update_elem(&owners, &vm->kvm, &owner, BPF_ANY);
	}
	visit->index = vm->next;
	return 0;
}

#define PF_KTHREAD 0x00200000 /* include/linux/sched.h */

/* Finds the owners of VMs that are new, or whose owner has ended; run only if there are such. */
SEC("iter/task")
int find_owners(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task, *leader;
	struct visit visit = { .owner.vm_fd = -1 };
	struct unowned *unowned;
	__u64 mm;

	if (!task)
		return 0;
	mm = (__u64)task->mm;
	leader = task->group_leader;
	/* A kernel thread may have borrowed the memory (vhost's do). */
	if (!mm || task->flags & PF_KTHREAD || (leader != task && leader->mm))
		return 0;
	unowned = bpf_map_lookup_elem(&unowned_vms, &mm);
	if (!unowned || unowned->round != control.round)
		return 0;
	visit.owner.task = (__u64)task;
	if (unowned->files == read_files_of(&visit.owner))
		return 0;
	unowned->files = read_files_of(&visit.owner);
	visit.index = unowned->first;
	visit.slots_before = control.slots;
	visit.owner.tgid = task->tgid;
	visit.owner.start_boottime = leader->start_boottime;
	bpf_loop(MAX_VMS, visit_vm, &visit, 0);
	return 0;
}

/* ---- one vCPU in full ----------------------------------------------------------------------------------------------- */

static long find_wanted_vm(__u32 index, struct list_walk *walk)
{
	if (walk->node == control.vm_list || step(walk))
		return 1;
	walk->ended = walk->before - bpf_core_field_offset(struct kvm, vm_list) == walk->wanted;
	return walk->ended;
}

static long find_wanted_vcpu(__u32 index, struct vcpu_walk *walk)
{
	struct kvm_vcpu *vcpu;

	walk->index = index;
	vcpu = (void *)find_vcpu(walk);
	if ((__u64)vcpu >= LOWEST_POINTER && READ(vcpu, vcpu_id) == walk->wanted_vcpu_id) {
		walk->vcpu = (__u64)vcpu;
		return 1;
	}
	return 0;
}

static __always_inline void read_state(const struct kvm_vcpu *vcpu, struct vcpu_state *state)
{
	const struct kvm_vcpu___bitmap *flavour = (void *)vcpu;
	const struct kvm *kvm = BPF_CORE_READ(vcpu, kvm);
	__u32 bytes = control.wanted_bytes;

	state->vcpu_id = BPF_CORE_READ(vcpu, vcpu_id);
	state->tid = read_tid(vcpu);
	bpf_probe_read_kernel(state->regs, sizeof(state->regs), FIELD(vcpu, struct kvm_vcpu, arch.regs));
	state->rip = bpf_core_field_exists(vcpu->arch.rip) ? BPF_CORE_READ(vcpu, arch.rip)
							    : read_u64(FIELD(vcpu, struct kvm_vcpu, arch.regs) + 128);
	state->regs_avail = bpf_core_field_exists(flavour->arch.regs_avail)
				    ? BPF_CORE_READ(flavour, arch.regs_avail[0])
				    : BPF_CORE_READ(vcpu, arch.regs_avail);
	state->guest_state_protected = state->vm_type = NOT_KNOWN;
	if (bpf_core_field_exists(vcpu->arch.guest_state_protected))
		state->guest_state_protected = BPF_CORE_READ(vcpu, arch.guest_state_protected);
	if (bpf_core_field_exists(kvm->arch.vm_type))
		state->vm_type = BPF_CORE_READ(kvm, arch.vm_type);
	if (bytes <= STATISTICS_BYTES)
		bpf_probe_read_kernel(state->statistics, bytes, FIELD(vcpu, struct kvm_vcpu, stat));
}

SEC("raw_tp")
int read_vcpu(void *ctx)
{
	struct list_walk walk = start_at_head();
	struct vcpu_walk vcpu = { .wanted_vcpu_id = control.wanted_vcpu_id };
	struct kvm *kvm = (void *)control.wanted_vm;
	struct vcpu_state *state;
	__u32 zero = 0, online;

	control.found = 0;
	walk.wanted = control.wanted_vm;
	bpf_loop(MAX_VMS, find_wanted_vm, &walk, 0);
	control.broken = !walk.ended && walk.node != control.vm_list;
	state = bpf_map_lookup_elem(&vcpu_state, &zero);
	if (!walk.ended || !state)
		return 0;
	online = READ(kvm, online_vcpus.counter);
	vcpu.head = (__u64)READ(kvm, vcpu_array.xa_head);
	if (online && online <= MAX_VCPUS_OF_VM)
		bpf_loop(online, find_wanted_vcpu, &vcpu, 0);
	if (!vcpu.vcpu)
		return 0;
	read_state((void *)vcpu.vcpu, state);
	control.found = is_listed((__u64)kvm);
	return 0;
}
