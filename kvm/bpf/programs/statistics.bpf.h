/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Everything else that KVM counts: a part of vcpus.bpf.c.
 *
 * Sums over a VM's vCPUs are made here: to sum 10,000 numbers in Python takes longer than to read them. Where a load of
 * the kernel's memory is an instruction, one word of many vCPUs is read after the other: the CPU then waits for a dozen
 * cache lines at once. Where it is a call of a helper, a struct of statistics is copied whole by one, and the wanted
 * words are picked from the copy.
 */
#ifndef STATISTICS_BPF_H
#define STATISTICS_BPF_H

#include "records.bpf.h"

struct word_walk {
	__u64 from;
	__u32 wanted, at;
};

static __always_inline bool copy_raw(__u64 from, __u32 bytes)
{
#ifndef DIRECT_LOADS
	__u32 zero = 0;
	struct raw_statistics *raw = bpf_map_lookup_elem(&raw_statistics, &zero);

	if (!raw || bytes > STATISTICS_BYTES || bpf_probe_read_kernel(raw, bytes, (void *)from))
		return false;
#endif
	return true;
}

static __always_inline __u64 read_word(__u64 from, __u64 word)
{
#ifdef DIRECT_LOADS
	return read_u64((void *)(from + word * sizeof(__u64)));
#else
	__u32 zero = 0;
	struct raw_statistics *raw = bpf_map_lookup_elem(&raw_statistics, &zero);

	return raw && word < STATISTICS_BYTES / sizeof(__u64) ? raw->words[word] : 0;
#endif
}

/* Put a word into the row of the VM that is being read. */
static long add_word(__u32 number, struct word_walk *walk)
{
	__u32 which = (walk->wanted + number) & (MAX_WORDS - 1);
	__u64 value = read_word(walk->from, control.wanted_words[which]);

	control.row[which] += value;
	return 0;
}

#ifdef DIRECT_LOADS
struct sum_walk {
	__u64 offset, sum;
};

static long add_of_vcpu(__u32 number, struct sum_walk *walk)
{
	walk->sum += read_u64((void *)(control.to_add[number & (MAX_TO_ADD - 1)] + walk->offset));
	return 0;
}

/* Add a word of all vCPUs that wait for that. */
static long add_of_all(__u32 number, void *unused)
{
	__u32 which = (control.vm_words + number) & (MAX_WORDS - 1);
	struct sum_walk walk = { .offset = control.wanted_words[which] * sizeof(__u64) };

	bpf_loop(control.adding, add_of_vcpu, &walk, 0);
	control.row[which] += walk.sum;
	return 0;
}

__noinline int add_waiting(void)
{
	__u64 nothing = 0;

	bpf_loop(control.sum_words, add_of_all, &nothing, 0);
	control.adding = 0;
	return 0;
}
#endif

static long clear_word(__u32 number, struct word_walk *walk)
{
	control.row[(walk->wanted + number) & (MAX_WORDS - 1)] = 0;
	return 0;
}

/* Put a word into the column of all vCPUs. */
static long pick_word(__u32 number, struct word_walk *walk)
{
	__u32 which = (walk->wanted + number) & (MAX_WORDS - 1), at = walk->at + number * control.vcpu_capacity;
	__u64 *value = bpf_map_lookup_elem(&stat_values, &at);

	if (!value)
		return 1;
	*value = read_word(walk->from, control.wanted_words[which]);
	return 0;
}

static long store_word(__u32 number, struct word_walk *walk)
{
	__u32 at = walk->at + number;
	__u64 *value = bpf_map_lookup_elem(&stat_values, &at);

	if (!value)
		return 1;
	*value = control.row[number & (MAX_WORDS - 1)];
	return 0;
}

/* Begin a VM's row: with its own statistics, and with sums of nothing. */
__noinline int begin_row(__u64 kvm)
{
	struct word_walk walk = { .from = (__u64)FIELD(kvm, struct kvm, stat) };

	bpf_loop(control.vm_words + control.sum_words, clear_word, &walk, 0);
	control.adding = 0;
	if (control.vm_words && copy_raw(walk.from, control.vm_stat_bytes))
		bpf_loop(control.vm_words, add_word, &walk, 0);
	return 0;
}

/* Add a vCPU's statistics to the row of its VM, or put them into the columns of all vCPUs. */
__noinline int pick_vcpu_statistics(__u64 statistics, __u32 vcpu_index)
{
	struct word_walk walk = { .from = statistics, .wanted = control.vm_words };

#ifdef DIRECT_LOADS
	if (control.sum_words) {
		control.to_add[control.adding & (MAX_TO_ADD - 1)] = statistics;
		if (++control.adding >= MAX_TO_ADD)
			add_waiting();
		return 0;
	}
#endif
	if (!copy_raw(statistics, control.vcpu_stat_bytes))
		return 0;
	walk.at = control.vcpu_values + vcpu_index;
	if (control.sum_words)
		bpf_loop(control.sum_words, add_word, &walk, 0);
	else
		bpf_loop(control.vcpu_words, pick_word, &walk, 0);
	return 0;
}

/* Give a VM's row to userspace. */
__noinline int store_row(__u32 vm_index)
{
	__u32 words = control.vm_words + control.sum_words;
	struct word_walk walk = { .at = vm_index * words };

#ifdef DIRECT_LOADS
	if (control.adding)
		add_waiting();
#endif
	bpf_loop(words, store_word, &walk, 0);
	return 0;
}

#endif
