"""From a guest that is stuck to the warning, where KVM itself tells where notify exits are: nothing is traced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.agents import run_agent
from tests.lab.inside.patched_verdicts.conftest import TRACING
from tests.lab.inside.perf_reader import open_perf_reader
from tests.lab.inside.verdicts.test_verdicts import (
    COUNT_IN_RCX,
    END,
    FROM_ENCLAVE,
    STALL,
    Listener,
    Tell,
    count_events,
    make_uuid,
    open_guest,
    open_listener,
    to_seconds,
)
from tests.live.tiny_guest import CODE
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("injector")

# That nobody is called stalled has no end to wait for: it must hold for so long.
OBSERVED_SECONDS = 20.0
LIVELY = {"rips": {"rips": 4, "rounds": 0}, "rep": {"flags": COUNT_IN_RCX, "rcx": 1 << 62}}


def wait_until_known(listener: Listener, *vms: str) -> None:
    """Wait until the agent knows whose VMs these are: processes that flood answer nobody here."""
    agent = listener.agent
    wait_until(lambda: all(agent.samples("kvm_vm_info", vm=vm) for vm in vms), f"{vms} are known")


@pytest.fixture(scope="module")
def listener(perf_opens: Callable[[], int]) -> Iterator[Listener]:
    """An agent that was never without somebody who counts its perf events."""
    with open_listener("--no-trigger.bpf") as opened:
        yield opened


def test_the_agent_finds_out_by_itself(listener: Listener) -> None:
    assert listener.agent.samples("kvm_exporter_evidence_info") == {(("evidence", "kernel"),): 1.0}
    document = listener.agent.get_json("/api/v1/vcpus")
    assert (document["evidence"], document["problem"]) == ("kernel", None)
    assert "KVM itself tells where notify exits are" in run_agent("check")


def test_a_stall_is_told_of_and_no_perf_event_is_opened(
    listener: Listener, perf_opens: Callable[[], int], tell: Tell
) -> None:
    agent = listener.agent
    with ExitStack() as stack:
        stuck = stack.enter_context(open_guest(60, "stuck"))
        lively = {}
        for number, (name, keys) in enumerate(LIVELY.items()):
            guest = stack.enter_context(open_guest(61 + number, name))
            lively[f"{make_uuid(61 + number)}-{guest.pid}"] = (guest, name, keys)
        vm = f"{make_uuid(60)}-{stuck.pid}"
        wait_until_known(listener, vm, *lively)
        for guest, _name, keys in lively.values():
            guest.notify(0, **keys)
        began = time.monotonic()
        stuck.notify(0, exits=0)
        line = listener.wait_for_line(STALL, vm)
        suspect, stalled = listener.wait_for(vm, "suspect"), listener.wait_for(vm, "stalled")
        tell(
            f"told by KVM: first exit to the line {time.monotonic() - began:.2f} s, of which suspect to the line "
            f"{to_seconds(line) - to_seconds(suspect):.2f} s, 1 s of which makes it a stall"
        )
        assert (line["evidence"], line["registers"], line["nested"]) == ("kernel", "unchanged", "no")
        assert stalled["reason"].startswith("it took ")
        found = listener.find_vcpu(vm)
        assert (found["state"], found["evidence"], found["rip"]) == ("stalled", "kernel", line["rip"])
        time.sleep(OBSERVED_SECONDS)
        for other, (_guest, name, _keys) in lively.items():
            states = listener.states(other)
            tell(f"told by KVM: lively ({name}) was {sorted(set(states))}, {len(states)} verdicts")
            assert "stalled" not in states
            assert "progressing" in states
        assert listener.states(vm)[-1] == "stalled"
        stuck.stop()
        assert hex(stuck.wait_for("done")["code"]) == line["rip"]
        stuck.send("loop")
        listener.wait_for_line(END, vm)
        stuck.stop()
    assert agent.samples("kvm_exporter_trace_armings_total") == {(): 0.0}
    assert count_events(agent.pid) == 0
    assert perf_opens() == 0
    for name in ("kvm_exit", "kvm_notify_window"):
        assert (TRACING / f"events/kvm/{name}/enable").read_text().strip() == "0"


def test_a_nested_guest_that_is_stuck_is_told_of_as_such(listener: Listener, perf_opens: Callable[[], int]) -> None:
    with open_guest(67, "nested") as guest:
        vm = f"{make_uuid(67)}-{guest.pid}"
        wait_until_known(listener, vm)
        guest.notify(0, exits=0, nested=1)
        line = listener.wait_for_line(STALL, vm)
        assert (line["evidence"], line["nested"]) == ("kernel", "yes")
        assert "The RIP is that of its nested guest." in line["meaning"]
        assert line["rip"] == hex(CODE)
    assert perf_opens() == 0


def test_rip_0_is_told_of_and_an_enclave_is_unknown(listener: Listener, perf_opens: Callable[[], int]) -> None:
    with open_guest(64, "zero") as zero, open_guest(65, "enclave") as enclave:
        wait_until_known(listener, f"{make_uuid(64)}-{zero.pid}", f"{make_uuid(65)}-{enclave.pid}")
        enclave.notify(0, exits=0, flags=FROM_ENCLAVE)
        zero.notify(0, exits=0, code=0)
        assert listener.wait_for_line(STALL, make_uuid(64))["rip"] == "0x0"
        assert "enclave" in listener.wait_for(make_uuid(65), "unknown")["reason"]
        time.sleep(OBSERVED_SECONDS / 2)
        assert not {"suspect", "stalled"} & set(listener.states(make_uuid(65)))
    assert perf_opens() == 0


def test_a_guest_with_other_exits_in_between_is_traced_and_not_stalled(listener: Listener) -> None:
    """KVM cannot tell what these exits are; the control of what counts perf events, too."""
    with open_guest(66, "others") as guest:
        wait_until_known(listener, f"{make_uuid(66)}-{guest.pid}")
        guest.notify(0, other=2, rounds=0)
        assert listener.wait_for(make_uuid(66), "progressing", 60.0)
        assert "stalled" not in listener.states(make_uuid(66))
    assert listener.agent.samples("kvm_exporter_trace_armings_total")[()] > 0


def test_what_counts_perf_events_does_count(perf_opens: Callable[[], int]) -> None:
    before = perf_opens()
    with open_perf_reader("kvm/kvm_exit", os.getpid()):
        assert perf_opens() > before
