"""What KVM's statistics mean, for the help texts of their metrics.

From Documentation/virt/kvm/ (api.rst, halt-polling.rst, x86/mmu.rst) and from where arch/x86/kvm and virt/kvm count
them, in Linux 6.1 to 7.x. A name that is not here is described by what the kernel says of its type and unit alone.
"""

from __future__ import annotations

from typing import Final

HELP: Final = {
    "vm/remote_tlb_flush": "TLB flushes on all its vCPUs that were carried out",
    "vm/remote_tlb_flush_requests": "TLB flushes on all its vCPUs that were asked for, as some turn out to be needless",
    "vm/mmu_shadow_zapped": "shadow page tables that were thrown away",
    "vm/mmu_pte_write": "guest writes to page tables that KVM shadows",
    "vm/mmu_pde_zapped": "entries of shadow page directories that were thrown away",
    "vm/mmu_flooded": "shadow page tables dropped as the guest wrote to them often: the page is used for other things",
    "vm/mmu_recycled": "shadow page tables taken from one guest page for another",
    "vm/mmu_cache_miss": "shadow page tables that had to be made anew",
    "vm/mmu_unsync": "shadow page tables that may differ from the guest's until its next TLB flush",
    "vm/pages_4k": "mappings of 4 KiB in its page tables",
    "vm/pages_2m": "mappings of 2 MiB in its page tables",
    "vm/pages_1g": "mappings of 1 GiB in its page tables",
    "vm/nx_lpage_splits": "large pages that are mapped as small ones, against iTLB multihit (kvm.nx_huge_pages)",
    "vm/max_mmu_rmap_size": "the most reverse mappings that one guest page has had",
    "vm/max_mmu_page_hash_collisions": "the most collisions in KVM's hash table of shadow page tables",
    "vcpu/halt_successful_poll": "halts for which KVM polled and was woken meanwhile, so that the thread did not sleep",
    "vcpu/halt_attempted_poll": "halts for which KVM polled before it would sleep",
    "vcpu/halt_poll_invalid": "halt polls that ended for another reason than a wake-up",
    "vcpu/halt_wakeup": "wake-ups of a vCPU that slept after a halt",
    "vcpu/halt_poll_success_ns": "time of halt polls that a wake-up ended",
    "vcpu/halt_poll_fail_ns": "time of halt polls in vain: CPU time that bought nothing",
    "vcpu/halt_wait_ns": "time asleep after halts: the guest had nothing to do, or waited",
    "vcpu/halt_poll_success_hist": "halt polls that a wake-up ended, by how long they took",
    "vcpu/halt_poll_fail_hist": "halt polls in vain, by how long they took",
    "vcpu/halt_wait_hist": "sleeps after halts, by how long they took",
    "vcpu/blocking": "whether it sleeps, because its guest has halted",
    "vcpu/pf_taken": "page faults of the guest that KVM was called for",
    "vcpu/pf_fixed": "page faults that KVM mended by a mapping",
    "vcpu/pf_emulate": "page faults after which KVM emulated the instruction",
    "vcpu/pf_spurious": "page faults whose cause was gone when KVM looked",
    "vcpu/pf_fast": "page faults that KVM mended without its MMU lock",
    "vcpu/pf_mmio_spte_created": "page faults on device memory for which KVM noted that it is that",
    "vcpu/pf_guest": "page faults that are the guest's own, and were passed to it",
    "vcpu/tlb_flush": "TLB flushes",
    "vcpu/invlpg": "INVLPG instructions that KVM carried out, with shadow paging",
    "vcpu/exits": "VM exits of all kinds",
    "vcpu/io_exits": "VM exits for port I/O",
    "vcpu/mmio_exits": "VM exits for device memory that userspace had to handle",
    "vcpu/signal_exits": "times that its thread left the guest because of a signal",
    "vcpu/irq_window_exits": "VM exits because the guest was ready for an interrupt",
    "vcpu/nmi_window_exits": "VM exits because the guest was ready for an NMI",
    "vcpu/l1d_flush": "L1 data cache flushes before the guest was entered (L1TF)",
    "vcpu/halt_exits": "VM exits because the guest halted",
    "vcpu/request_irq_exits": "returns to userspace because it wanted to deliver an interrupt",
    "vcpu/irq_exits": "VM exits for interrupts of the host",
    "vcpu/host_state_reload": "times that the host's segment registers and MSRs had to be restored",
    "vcpu/fpu_reload": "times that the guest's FPU registers were loaded",
    "vcpu/insn_emulation": "instructions that KVM emulated",
    "vcpu/insn_emulation_fail": "instructions that KVM could not emulate",
    "vcpu/hypercalls": "hypercalls of the guest",
    "vcpu/irq_injections": "interrupts given to the guest",
    "vcpu/nmi_injections": "NMIs given to the guest",
    "vcpu/req_event": "times that KVM looked whether there was an event for the guest",
    "vcpu/nested_run": "entries into a nested guest",
    "vcpu/directed_yield_attempted": "times that another vCPU asked for it to be run, as it held a lock",
    "vcpu/directed_yield_successful": "times that it was run because another vCPU asked for that",
    "vcpu/preemption_reported": "preemptions by the host of which the guest was told: it can spare its IPIs and spins",
    "vcpu/preemption_other": "preemptions by the host of which the guest could not be told",
    "vcpu/guest_mode": "whether it runs a nested guest",
    "vcpu/notify_window_exits": "VM exits because the guest opened no event window for too long",
    "vcpu/notify_window_same_rip_exits": "notify exits at the RIP of the one before",
    "vcpu/notify_window_stuck_exits": "notify exits at the RIP and with the registers of the one before",
    "vcpu/notify_window_context_invalid_exits": "notify exits after which the guest's state is lost",
    "vcpu/notify_window_last_guest_mode": "whether the last notify exit came from a nested guest",
    "vcpu/notify_window_streak": "how many notify exits in a row were at one RIP, until now",
}


def describe_name(key: str) -> str:
    """Return what a statistic means, by its name like ``vcpu/exits``; "" where that is not known."""
    return HELP.get(key, "")
