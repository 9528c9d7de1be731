"""A user who makes VMs by the thousand: the scrape stays fast, and others keep every series."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm.vm_budget import PROCESS_VMS
from tests.agents import AgentProcess, open_agent
from tests.hostile.vm_flood import open_flood
from tests.live import GuestProcess, open_guest_process

# The kernel's list holds more of them than the BPF programs have room for.
VMS = 16_600
NOBODY = 65534
HONEST = "5107a7ed-0000-4000-8000-00000000aaaa"
SCRAPE_SECONDS = 1.0


@pytest.fixture(scope="module")
def honest() -> Iterator[GuestProcess]:
    with open_guest_process(name="honest", uuid=HONEST, vcpus=2, stats_fds=True) as guest:
        yield guest


@pytest.fixture
def agent(honest: GuestProcess) -> Iterator[AgentProcess]:
    del honest
    with open_agent() as running:
        yield running


def measure_scrapes(agent: AgentProcess, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        status, _headers, body = agent.get()
        seconds.append(time.perf_counter() - started)
        assert status == 200
        assert body.count(b"kvm_vcpu_exits_total{") >= 2
    return seconds


def count_shown(agent: AgentProcess, pids: set[int]) -> int:
    samples = [dict(labels) for labels in agent.samples("kvm_vm_info")]
    return sum(int(labels["pid"]) in pids for labels in samples)


def read_children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def read_resident_mb(pid: int) -> int:
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) // 1024


def test_16600_vms_of_one_process(agent: AgentProcess, honest: GuestProcess, tell: Callable[[str], None]) -> None:
    vm, reason = f"{HONEST}-{honest.pid}", (("reason", "over_budget"),)
    assert len(agent.samples("kvm_vcpu_exits_total", vm=vm)) == 2
    with open_flood(1, VMS, NOBODY) as flood:
        first, *seconds = measure_scrapes(agent, 6)
        assert count_shown(agent, read_children(flood)) == PROCESS_VMS
        assert agent.samples("kvm_host_vms_over_budget") == {(): VMS - PROCESS_VMS}
        assert reason in agent.samples("kvm_exporter_incomplete_reason_info")
        assert len(agent.samples("kvm_vcpu_exits_total", vm=vm)) == 2
        assert count_shown(agent, {honest.pid}) == 1
        lines = [line for line in agent.log if "more VMs than are shown" in line]
        assert len(lines) == 1
        assert f"uid={NOBODY}" in lines[0]
        resident = read_resident_mb(agent.pid)
        tell(
            f"{VMS:,} VMs of one process: first scrape {first:.2f} s, then {max(seconds):.2f} s at most, {PROCESS_VMS} "
            f"shown, agent at {resident} MB"
        )
        assert max(first, *seconds) < SCRAPE_SECONDS
    assert agent.samples("kvm_host_vms_over_budget") == {(): 0.0}
    assert reason not in agent.samples("kvm_exporter_incomplete_reason_info")


def test_vms_of_many_processes_of_one_user(
    agent: AgentProcess, honest: GuestProcess, tell: Callable[[str], None]
) -> None:
    """Each process stays within its own budget, the user does not."""
    with open_flood(90, PROCESS_VMS - 4, NOBODY) as flood:
        measure_scrapes(agent, 2)
        seconds = measure_scrapes(agent, 5)
        shown = count_shown(agent, read_children(flood))
        assert shown == 4096
        assert agent.samples("kvm_host_vms_over_budget") == {(): 90.0 * (PROCESS_VMS - 4) - shown}
        assert count_shown(agent, {honest.pid}) == 1
        tell(
            f"{90 * (PROCESS_VMS - 4):,} VMs of one user in 90 processes: scrape {max(seconds):.2f} s, {shown:,} shown"
        )
        assert max(seconds) < SCRAPE_SECONDS
