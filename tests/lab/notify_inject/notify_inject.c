// SPDX-License-Identifier: GPL-2.0
/*
 * notify_inject - make a guest's port write look like a notify VM exit, on AMD
 *
 * TEST ONLY. It falsifies a statistic and a tracepoint of KVM. It is built by
 * tests/lab for kernels that run under emulation, and never installed.
 *
 * Notify VM exits exist on Intel alone, and no emulator makes them. Everything
 * around them can be had for real, though: a vCPU that leaves the guest, the
 * counter in struct kvm_vcpu_stat, the kvm:kvm_exit record with the RIP and
 * whatever else the vCPU did. So this module takes an exit that a guest can make
 * at will, a write to a port, and turns it into what handle_notify() in
 * arch/x86/kvm/vmx/vmx.c would have left behind:
 *
 *   kprobe on kvm_fast_pio           ++vcpu->stat.notify_window_exits, and who
 *                                    goes on: the guest or its VMM
 *   kretprobe on svm_get_exit_info   the record of kvm:kvm_exit: exit_reason 75,
 *                                    isa 1 (VMX), info1, info2, guest_rip
 *   kprobe on kvm_arch_vcpu_destroy  forget what is remembered of a vCPU
 *
 * A KVM with this project's patches (kvm/patches) has one handler of notify exits
 * for all vendors, kvm_handle_notify_exit(). Where it is there, it is called, and
 * whatever it does is real: nothing is counted here.
 *
 * THE GUEST'S SIDE. "out %al, $0x75" with:
 *
 *   R8   exit qualification: info1 of the record. With bit 0 (context invalid)
 *        the vCPU leaves KVM_RUN with KVM_EXIT_NOTIFY, as handle_notify() does.
 *   R9   IDT-vectoring information: info2 of the record
 *   R10  flags:
 *        1  hide the RIP: guest_rip of the record is 0, as with protected guests,
 *           and a handler that asks is told that it is not known
 *        2  count in RCX: each exit takes one from RCX and leaves RIP where it
 *           is, as REP does; with the last one the instruction is over
 *        4  every exit leaves KVM_RUN with KVM_EXIT_NOTIFY, as for a VMM that
 *           asked for KVM_X86_NOTIFY_VMEXIT_USER
 *        8  from within an SGX enclave: exit_reason of the record has bit 27, and
 *           a handler that asks is told that RIP is not the guest's
 *   R11  how many notify exits are made before the instruction is over, all at
 *        its RIP with nothing executed in between; 0: for ever
 *
 * As after a real notify exit, the RIP stays on the instruction. With the last
 * of the exits the write goes the way of every port write (an ioeventfd, or
 * KVM_EXIT_IO), so the guest goes on behind it; its record says notify, too.
 * An exit that leaves KVM_RUN with KVM_EXIT_NOTIFY leaves the RIP to the VMM.
 */
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/module.h>

#define INJECT_PORT		0x75
#define SVM_EXIT_IOIO		0x7b	/* arch/x86/include/uapi/asm/svm.h */
#define EXIT_REASON_NOTIFY	75	/* arch/x86/include/uapi/asm/vmx.h */
#define NOTIFY_VM_CONTEXT_INVALID 1	/* arch/x86/include/asm/vmx.h */
#define ISA_VMX			1	/* KVM_ISA_VMX, arch/x86/kvm/trace.h */

#define FLAG_HIDE_RIP		1
#define FLAG_COUNT_IN_RCX	2
#define FLAG_TO_USER		4
#define FLAG_ENCLAVE		8
#define EXIT_REASON_ENCLAVE	BIT(27)

/*
 * An instruction that is not over: how many exits it has made so far, and whether
 * what comes next is the port write that it ends with.
 */
struct stream {
	struct kvm_vcpu *vcpu;
	u64 made;
	bool ending;
};

#define STREAMS 1024
static struct stream streams[STREAMS];
static DEFINE_RAW_SPINLOCK(streams_lock);

static struct stream *find_stream(struct kvm_vcpu *vcpu)
{
	int i;

	for (i = 0; i < STREAMS; i++)
		if (streams[i].vcpu == vcpu)
			return &streams[i];
	return NULL;
}

static struct stream *get_stream(struct kvm_vcpu *vcpu)
{
	struct stream *stream = find_stream(vcpu);

	if (stream)
		return stream;
	stream = find_stream(NULL);
	if (stream)
		*stream = (struct stream){ .vcpu = vcpu };
	else
		pr_err_ratelimited("notify_inject: more than %d streams\n", STREAMS);
	return stream;
}

/* Counts an exit of a stream; true when it was the last of as many as wanted. */
static bool count_in_stream(struct kvm_vcpu *vcpu, u64 wanted)
{
	struct stream *stream;
	unsigned long flags;
	bool last = true;

	if (wanted == 1)
		return true;
	if (wanted == 0)
		return false;
	raw_spin_lock_irqsave(&streams_lock, flags);
	stream = get_stream(vcpu);
	if (stream) {
		last = ++stream->made >= wanted;
		if (last)
			stream->vcpu = NULL;
	}
	raw_spin_unlock_irqrestore(&streams_lock, flags);
	return last;
}

static bool is_over(struct kvm_vcpu *vcpu)
{
	unsigned long *regs = vcpu->arch.regs;

	if (regs[VCPU_REGS_R10] & FLAG_COUNT_IN_RCX)
		return --regs[VCPU_REGS_RCX] == 0;
	return count_in_stream(vcpu, regs[VCPU_REGS_R11]);
}

/*
 * To make the probed function return at once, execution goes on in one of these
 * instead of behind the probe: they return to the same caller. Debian's kernels
 * lack CONFIG_FUNCTION_ERROR_INJECTION, whose override_function_with_return()
 * would do the same and without which it silently does nothing.
 */
static noinline notrace int return_to_guest(void)
{
	return 1;
}

static noinline notrace int return_to_user(void)
{
	return 0;
}

static int return_instead(struct pt_regs *probed, int (*function)(void))
{
	probed->ip = (unsigned long)function;
	return 1;
}

/* How many streams are ending: while there is none, no exit searches for its own. */
static atomic_t ending;

static bool begin_end(struct kvm_vcpu *vcpu)
{
	struct stream *stream;
	unsigned long flags;

	raw_spin_lock_irqsave(&streams_lock, flags);
	stream = get_stream(vcpu);
	if (stream) {
		stream->ending = true;
		atomic_inc(&ending);
	}
	raw_spin_unlock_irqrestore(&streams_lock, flags);
	return stream;
}

/* True when the port write is the one that a stream ends with; it is taken then, and the stream forgotten. */
static bool take_end(struct kvm_vcpu *vcpu)
{
	struct stream *stream;
	unsigned long flags;
	bool taken = false;

	if (!atomic_read(&ending))
		return false;
	raw_spin_lock_irqsave(&streams_lock, flags);
	stream = find_stream(vcpu);
	if (stream && stream->ending) {
		stream->vcpu = NULL;
		stream->ending = false;
		atomic_dec(&ending);
		taken = true;
	}
	raw_spin_unlock_irqrestore(&streams_lock, flags);
	return taken;
}

static int (*handle_notify_exit)(struct kvm_vcpu *vcpu, unsigned long exit_qual, u32 vectoring_info, bool rip_known);
static int (*fast_pio)(struct kvm_vcpu *vcpu, int size, unsigned short port, int in);

/*
 * What runs instead of the probed function where KVM has a handler. It is not
 * called from the probe: it reads guest memory, which may sleep.
 */
static noinline notrace int call_handler(struct kvm_vcpu *vcpu, int size, unsigned short port, int in)
{
	unsigned long *regs = vcpu->arch.regs;
	u64 flags = regs[VCPU_REGS_R10];

	if (!handle_notify_exit(vcpu, regs[VCPU_REGS_R8], regs[VCPU_REGS_R9],
				!(flags & (FLAG_HIDE_RIP | FLAG_ENCLAVE))))
		return 0;
	/* The handler asks the VM for this, here each instruction has its own answer. */
	if (flags & FLAG_TO_USER) {
		vcpu->run->exit_reason = KVM_EXIT_NOTIFY;
		vcpu->run->notify.flags = 0;
		return 0;
	}
	if (!is_over(vcpu) || !begin_end(vcpu))
		return 1;
	return fast_pio(vcpu, size, port, in);
}

/* int kvm_fast_pio(struct kvm_vcpu *vcpu, int size, unsigned short port, int in) */
static int on_fast_pio(struct kprobe *probe, struct pt_regs *probed)
{
	struct kvm_vcpu *vcpu = (struct kvm_vcpu *)probed->di;
	u64 qualification;

	if ((u16)probed->dx != INJECT_PORT || probed->cx)
		return 0;
	if (handle_notify_exit) {
		if (take_end(vcpu))
			return 0;
		probed->ip = (unsigned long)call_handler;
		return 1;
	}
	vcpu->stat.notify_window_exits++;
	qualification = vcpu->arch.regs[VCPU_REGS_R8];
	if ((qualification & NOTIFY_VM_CONTEXT_INVALID) ||
	    (vcpu->arch.regs[VCPU_REGS_R10] & FLAG_TO_USER)) {
		vcpu->run->exit_reason = KVM_EXIT_NOTIFY;
		vcpu->run->notify.flags = qualification & NOTIFY_VM_CONTEXT_INVALID ?
					  KVM_NOTIFY_CONTEXT_INVALID : 0;
		return return_instead(probed, return_to_user);
	}
	if (is_over(vcpu))
		return 0;
	return return_instead(probed, return_to_guest);
}

/* A probe that changes where execution goes on may not be optimised into a jump: having a post handler forbids it. */
static void after_fast_pio(struct kprobe *probe, struct pt_regs *probed, unsigned long flags)
{
}

static struct kprobe fast_pio_probe = {
	.symbol_name = "kvm_fast_pio",
	.pre_handler = on_fast_pio,
	.post_handler = after_fast_pio,
};

static int on_vcpu_destroy(struct kprobe *probe, struct pt_regs *probed)
{
	struct stream *stream;
	unsigned long flags;

	raw_spin_lock_irqsave(&streams_lock, flags);
	stream = find_stream((struct kvm_vcpu *)probed->di);
	if (stream) {
		if (stream->ending)
			atomic_dec(&ending);
		stream->vcpu = NULL;
	}
	raw_spin_unlock_irqrestore(&streams_lock, flags);
	return 0;
}

static struct kprobe vcpu_destroy_probe = {
	.symbol_name = "kvm_arch_vcpu_destroy",
	.pre_handler = on_vcpu_destroy,
};

/*
 * The fields of kvm:kvm_exit from exit_reason on. svm_get_exit_info() is handed
 * pointers into the record, as the last thing before the record is complete.
 * A test compares the record with events/kvm/kvm_exit/format.
 */
struct record {
	u32 exit_reason;
	u64 guest_rip;
	u32 isa;
	u64 info1;
	u64 info2;
};

struct exit_info_call {
	struct kvm_vcpu *vcpu;
	struct record *record;
	u64 *info1;
};

/* void svm_get_exit_info(vcpu, u32 *reason, u64 *info1, u64 *info2, u32 *intr_info, u32 *error_code) */
static int enter_exit_info(struct kretprobe_instance *instance, struct pt_regs *probed)
{
	struct exit_info_call *call = (struct exit_info_call *)instance->data;

	call->vcpu = (struct kvm_vcpu *)probed->di;
	call->record = (struct record *)probed->si;
	call->info1 = (u64 *)probed->dx;
	/* Pointers that do not lie in a record are those of KVM's error reports: not ours. */
	return &call->record->info1 != call->info1 || &call->record->info2 != (u64 *)probed->cx;
}

static int leave_exit_info(struct kretprobe_instance *instance, struct pt_regs *probed)
{
	struct exit_info_call *call = (struct exit_info_call *)instance->data;
	struct record *record = call->record;
	unsigned long *regs = call->vcpu->arch.regs;

	/* EXITINFO1 of an I/O intercept: the port in bits 31:16, bit 0 set for IN. */
	if (record->exit_reason != SVM_EXIT_IOIO || record->info1 >> 16 != INJECT_PORT || record->info1 & 1)
		return 0;
	record->exit_reason = EXIT_REASON_NOTIFY;
	if (regs[VCPU_REGS_R10] & FLAG_ENCLAVE)
		record->exit_reason |= EXIT_REASON_ENCLAVE;
	record->isa = ISA_VMX;
	record->info1 = regs[VCPU_REGS_R8];
	record->info2 = regs[VCPU_REGS_R9];
	if (regs[VCPU_REGS_R10] & FLAG_HIDE_RIP)
		record->guest_rip = 0;
	return 0;
}

static struct kretprobe exit_info_probe = {
	.kp.symbol_name = "svm_get_exit_info",
	.entry_handler = enter_exit_info,
	.handler = leave_exit_info,
	.data_size = sizeof(struct exit_info_call),
	.maxactive = 64,
};

/* Returns where a function is that is not exported to us, or NULL: a probe knows, and goes again at once. */
static void *find_function(const char *name)
{
	struct kprobe probe = { .symbol_name = name };
	void *address;

	if (register_kprobe(&probe))
		return NULL;
	address = probe.addr;
	unregister_kprobe(&probe);
	return address;
}

static int __init notify_inject_init(void)
{
	int err;

	fast_pio = find_function("kvm_fast_pio");
	handle_notify_exit = find_function("kvm_handle_notify_exit");
	err = register_kprobe(&fast_pio_probe);
	if (err)
		return err;
	err = register_kprobe(&vcpu_destroy_probe);
	if (err)
		goto no_destroy_probe;
	err = register_kretprobe(&exit_info_probe);
	if (err)
		goto no_exit_info_probe;
	return 0;

no_exit_info_probe:
	unregister_kprobe(&vcpu_destroy_probe);
no_destroy_probe:
	unregister_kprobe(&fast_pio_probe);
	return err;
}

static void __exit notify_inject_exit(void)
{
	unregister_kretprobe(&exit_info_probe);
	unregister_kprobe(&vcpu_destroy_probe);
	unregister_kprobe(&fast_pio_probe);
}

module_init(notify_inject_init);
module_exit(notify_inject_exit);
MODULE_DESCRIPTION("Test only: makes a guest's port write look like a notify VM exit");
MODULE_LICENSE("GPL");
