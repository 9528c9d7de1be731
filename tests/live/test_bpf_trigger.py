"""The trigger on this host's kernel, which may refuse programs at functions; the lab's kernels do not."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from kvm.bpf.notify_trigger import NotifyCall, NotifyTrigger
from kvm.errors import SourceUnavailable
from tests.live import open_guest_process

pytestmark = pytest.mark.live

RUN = "kvm_arch_vcpu_ioctl_run"
KVM_EXIT_IO, KVM_EXIT_IO_OUT = 2, 1


def test_a_function_that_does_not_exist_is_a_fact() -> None:
    before = os.listdir("/proc/self/fd")
    trigger = NotifyTrigger(lambda call: None, function="no_such_function_in_kvm")
    status = trigger.open()
    assert (status.attached, status.reason) == (False, "no module of this kernel has no_such_function_in_kvm")
    assert (trigger.deliver(), trigger.read_context_invalid(), trigger.lost) == (0, {}, (0, 0))
    with pytest.raises(ValueError, match="not attached"):
        assert trigger.fd
    trigger.close()
    assert os.listdir("/proc/self/fd") == before


def test_calls_reach_an_event_loop_or_the_refusal_is_told() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    calls: list[NotifyCall] = []
    trigger = NotifyTrigger(calls.append, function=RUN, exit_reason=KVM_EXIT_IO, flags=KVM_EXIT_IO_OUT)
    try:
        trigger.open()
    except SourceUnavailable as err:
        assert "prog 'on_" in err.reason
        assert "no capability is missing" in err.reason
        assert err.remedy
    else:
        with open_guest_process(vcpus=2, port_writes=1) as guest:
            asyncio.run(wait_for_calls(trigger, calls, {vcpu.tid for vcpu in guest.vcpus}))
            guest.run(999)
            counts = {thread.tid: count for thread, count in trigger.read_context_invalid().items()}
            assert counts == {vcpu.tid: 1000 for vcpu in guest.vcpus}
    trigger.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


class SlowObject:
    """BPF programs whose counts take a while to read."""

    def __init__(self) -> None:
        self.reading, self.done = threading.Event(), threading.Event()
        self.steps: list[str] = []

    def read_map(self, name: str, key_size: int, value_size: int) -> dict[bytes, bytes]:
        self.reading.set()
        self.done.wait(10)
        self.steps.append("read")
        return {}

    def close(self) -> None:
        self.steps.append("closed")


@pytest.mark.parametrize("read", ["read_context_invalid", "forget"])
def test_nothing_is_closed_while_somebody_reads(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trigger, slow = NotifyTrigger(lambda call: None), SlowObject()
    monkeypatch.setattr(trigger, "_object", slow)
    reads = {"read_context_invalid": trigger.read_context_invalid, "forget": lambda: trigger.forget(set())}
    reader, closer = threading.Thread(target=reads[read]), threading.Thread(target=trigger.close)
    reader.start()
    assert slow.reading.wait(10)
    closer.start()
    closer.join(0.1)
    slow.done.set()
    for thread in (reader, closer):
        thread.join(10)
    assert slow.steps == ["read", "closed"]


async def wait_for_calls(trigger: NotifyTrigger, calls: list[NotifyCall], tids: set[int]) -> None:
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def deliver() -> None:
        trigger.deliver()
        if tids <= {call.tid for call in calls}:
            done.set()

    loop.add_reader(trigger.fd, deliver)
    try:
        await asyncio.wait_for(done.wait(), 30)
    finally:
        loop.remove_reader(trigger.fd)
