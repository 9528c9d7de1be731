"""The trigger on this host's kernel, which may refuse programs at functions; the lab's kernels do not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvm.bpf.notify_trigger import NotifyCall, NotifyTrigger
from kvm.errors import SourceUnavailable
from tests.live import open_guest_process

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
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


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def measure_allocated() -> int:
    """How many bytes glibc's malloc has given out."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    found = libc.mallinfo2()
    allocated: int = found.uordblks + found.hblkhd
    return allocated


@pytest.mark.parametrize("kallsyms", ["/proc/kallsyms", "/dev/null"], ids=["known", "masked"])
def test_trying_again_and_again_leaves_nothing_behind(kallsyms: str) -> None:
    trigger = NotifyTrigger(lambda call: None, function="no_such_function_in_kvm", kallsyms=Path(kallsyms))
    trigger.open()
    before = measure_allocated()
    for _ in range(5):
        assert not trigger.open().attached
    trigger.close()
    assert measure_allocated() - before < 1 << 20


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A /sys in which kvm_intel is a module without types."""
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/btf").symlink_to("/sys/kernel/btf")
    (tmp_path / "module/kvm_intel").mkdir(parents=True)
    (tmp_path / "module/kvm_intel/initstate").write_text("live\n")
    return tmp_path


@pytest.mark.parametrize("kallsyms", ["", None], ids=["masked", "hidden"])
def test_where_symbols_cannot_be_read_nobody_says_that_no_module_has_it(
    sysfs: Path, tmp_path: Path, kallsyms: str | None
) -> None:
    path = tmp_path / "kallsyms"
    if kallsyms is not None:
        path.write_text(kallsyms)
    trigger = NotifyTrigger(lambda call: None, function="no_such_function_in_kvm", kallsyms=path, sys=sysfs)
    with pytest.raises(SourceUnavailable):
        trigger.open()
    path.write_text("0000000000000000 T kvm_vcpu_init\t[kvm]\n")
    assert trigger.open().reason == "no module of this kernel has no_such_function_in_kvm"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_a_user_who_may_not_search_modules_knows_it_from_symbols_or_says_which_capability_that_takes() -> None:
    code = (
        "from kvm.bpf.notify_trigger import NotifyTrigger\n"
        "for name, path in (('no_such_function', '/proc/kallsyms'), ('no_such_function', '/dev/null')):\n"
        "    try: print(NotifyTrigger(print, function=name, kallsyms=Path(path)).open().reason)\n"
        "    except SourceUnavailable as err: print(err.reason)\n"
    )
    imports = "from pathlib import Path\nfrom kvm.errors import SourceUnavailable\n"
    caps = "-all,+bpf,+perfmon,+dac_read_search"
    user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        f"--inh-caps={caps}",
        f"--ambient-caps={caps}",
    ]
    words = [*user, f"--bounding-set={caps}", sys.executable, "-c", imports + code]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    known, unknown = run.stdout.splitlines()
    assert known == "no module of this kernel has no_such_function"
    assert unknown.startswith("missing capability: CAP_SYS_ADMIN (while loading, because ")


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
