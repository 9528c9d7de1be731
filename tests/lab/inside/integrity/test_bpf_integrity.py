"""lockdown=integrity leaves the eBPF source and the trigger as they are."""

from __future__ import annotations

import select

from kvm.bpf.notify_trigger import NotifyCall, NotifyTrigger
from kvm.counters.bpf import BpfSource
from tests.lab.inside.kvm_readers import read_vcpu_statistics
from tests.live import GuestProcess


def test_the_source_reads_every_vcpu(guest: GuestProcess) -> None:
    source = BpfSource()
    source.open()
    (counters,) = (counters for key, counters in source.read().items() if key.pid == guest.pid)
    assert source.method == "list"
    source.close()
    exits = tuple(read_vcpu_statistics(guest, vcpu)["exits"] for vcpu in guest.vcpus)
    assert counters.per_vcpu == {"exits": exits, "notify_window_exits": (0, 0)}


def test_the_trigger_tells_of_calls(guest: GuestProcess) -> None:
    calls: list[NotifyCall] = []
    trigger = NotifyTrigger(calls.append, function="kvm_arch_vcpu_ioctl_run")
    assert trigger.open().attached
    guest.run(1)
    assert select.select([trigger.fd], [], [], 10)[0]
    assert trigger.deliver() == len(calls) > 0
    trigger.close()
    assert {call.pid for call in calls} == {guest.pid}
