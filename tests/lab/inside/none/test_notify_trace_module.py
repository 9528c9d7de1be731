"""What arming means for the module kvm: it stays while a thread is armed, and may be another one the next time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.errors import SourceUnavailable
from kvm.perf.notify_tracer import NotifyTracer
from tests.lab.inside.none.test_bpf_module import insert, is_loaded, remove
from tests.live import open_guest_process

IDENTITY = Path("/sys/kernel/tracing/events/kvm/kvm_exit/id")


@pytest.fixture(autouse=True)
def without_injector() -> Iterator[None]:
    """The injector uses kvm too; it is back afterwards if it was there."""
    was_loaded = is_loaded("notify_inject")
    if was_loaded:
        remove("notify_inject").check_returncode()
    yield
    for name in ("kvm", "kvm-amd", *(["notify_inject"] if was_loaded else [])):
        if not is_loaded(name):
            insert(name)


@pytest.fixture
def tracer() -> Iterator[NotifyTracer]:
    tracer = NotifyTracer()
    tracer.open()
    yield tracer
    tracer.close()


def trace_one_guest(tracer: NotifyTracer) -> bool:
    """Whether an armed guest's exits are seen; without the injector none of them is a notify exit."""
    with open_guest_process() as guest:
        armed = tracer.arm(guest.vcpus[0].tid)
        armed.watch_other_rips(1)
        guest.run(1)
        seen = armed.read().other_rip
        armed.disarm()
    return seen


def test_what_holds_the_module_and_what_does_not(tracer: NotifyTracer) -> None:
    remove("kvm_amd").check_returncode()
    tracer.hold_warm()
    assert remove("kvm").returncode != 0
    tracer.release_warm()
    armed = tracer.arm(os.getpid())
    assert remove("kvm").returncode != 0
    armed.disarm()
    remove("kvm").check_returncode()


def test_kvm_that_is_loaded_anew_is_traced_without_opening_the_tracer_again(tracer: NotifyTracer) -> None:
    """Its tracepoints may have other numbers then."""
    assert trace_one_guest(tracer)
    first = IDENTITY.read_text(encoding="ascii")
    for name in ("kvm_amd", "kvm"):
        remove(name).check_returncode()
    for call in (lambda: tracer.arm(os.getpid()), tracer.hold_warm, tracer.open):
        with pytest.raises(SourceUnavailable, match="the module kvm is not loaded"):
            call()
    insert("kvm")
    tracer.open()  # it had failed, and says so from then on
    insert("kvm-amd")
    for name in ("kvm_amd", "kvm"):
        remove(name).check_returncode()
    for name in ("kvm", "kvm-amd"):
        insert(name)
    assert trace_one_guest(tracer)
    print(f"kvm_exit had number {first.strip()} and has {IDENTITY.read_text(encoding='ascii').strip()}")
