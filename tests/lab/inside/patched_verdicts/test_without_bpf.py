"""The agent without BPF, on a KVM with the patches: stats fds tell all but registers, and nothing is traced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.agents import run_agent
from tests.lab.inside.patched_verdicts.test_kernel_evidence import LIVELY, OBSERVED_SECONDS, wait_until_known
from tests.lab.inside.verdicts.test_verdicts import (
    END,
    FROM_ENCLAVE,
    STALL,
    Listener,
    Tell,
    make_uuid,
    open_guest,
    open_listener,
)

pytestmark = pytest.mark.usefixtures("injector")

SOURCES = "--collector.source=stats_fd,debugfs"


@pytest.fixture(scope="module")
def listener(perf_opens: Callable[[], int]) -> Iterator[Listener]:
    with open_listener("--no-trigger.bpf", SOURCES) as opened:
        yield opened


def test_the_agent_finds_out_by_itself(listener: Listener) -> None:
    assert listener.agent.samples("kvm_exporter_evidence_info") == {(("evidence", "kernel"),): 1.0}
    document = listener.agent.get_json("/api/v1/vcpus")
    assert (document["evidence"], document["problem"]) == ("kernel", None)
    assert "KVM itself tells where notify exits are" in run_agent("check", SOURCES)


def test_the_verdicts_are_the_same_and_no_perf_event_is_opened(
    listener: Listener, perf_opens: Callable[[], int], tell: Tell
) -> None:
    with ExitStack() as stack:
        guests = {name: stack.enter_context(open_guest(70 + n, name)) for n, name in enumerate([*LIVELY, "enclave"])}
        stuck = stack.enter_context(open_guest(79, "stuck"))
        vms = {name: f"{make_uuid(70 + n)}-{guest.pid}" for n, (name, guest) in enumerate(guests.items())}
        vm = f"{make_uuid(79)}-{stuck.pid}"
        wait_until_known(listener, vm, *vms.values())
        for name, guest in guests.items():
            guest.notify(0, **LIVELY.get(name, {"exits": 0, "flags": FROM_ENCLAVE}))
        began = time.monotonic()
        stuck.notify(0, exits=0)
        line = listener.wait_for_line(STALL, vm)
        tell(f"told by KVM, by stats fds: first exit to the line {time.monotonic() - began:.2f} s")
        assert (line["evidence"], line["registers"], line["source"]) == ("kernel", "unchanged", "stats_fd")
        time.sleep(OBSERVED_SECONDS)
        for name, other in vms.items():
            states = listener.states(other)
            tell(f"told by KVM, by stats fds: {name} was {sorted(set(states))}, {len(states)} verdicts")
            assert "stalled" not in states
            assert ("unknown" if name == "enclave" else "progressing") in states
        assert listener.states(vm)[-1] == "stalled"
        stuck.stop()
        assert hex(stuck.wait_for("done")["code"]) == line["rip"]
        assert listener.agent.samples("kvm_exporter_trace_armings_total") == {(): 0.0}
        assert perf_opens() == 0
        # That a guest goes on and takes no notify exits any more, only its registers tell, or a trace.
        stuck.send("loop")
        listener.wait_for_line(END, vm)
        stuck.stop()
    assert listener.agent.samples("kvm_exporter_trace_armings_total")[()] > 0
