"""A VM's name that would keep Python's re busy for ever, and a pattern that lets it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.agents import open_agent, run_agent
from tests.live import open_guest_process
from tests.waiting import wait_until

PATTERN = "^([a-z]+-?)+$"  # the id of a VM has digits, so the name alone decides
NAME = "a" * 127 + "!"
SECONDS = 1.0
STOP_SECONDS = 3.0


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_a_hostile_name_at_a_hostile_pattern_costs_nothing(flag: str, tell: Callable[[str], None]) -> None:
    with open_guest_process(name=NAME, stats_fds=True, port_writes=1), open_agent(f"--vm.{flag}={PATTERN}") as agent:
        shown = 1 if flag == "exclude" else 0
        wait_until(lambda: sum(agent.samples("kvm_host_vms").values()) >= 1, "the VM is counted")
        started = time.perf_counter()
        assert sum(("name", NAME) in labels for labels in agent.samples("kvm_vm_info")) == shown
        scraped = time.perf_counter() - started
        started = time.perf_counter()
        assert agent.close() == 0
        stopped = time.perf_counter() - started
        tell(f"--vm.{flag}={PATTERN} and a name of 128 bytes: scrape {scraped:.2f} s, stopped in {stopped:.2f} s")
        assert scraped < SECONDS
        assert stopped < STOP_SECONDS


def test_once_with_it_ends() -> None:
    with open_guest_process(name=NAME, stats_fds=True, port_writes=1):
        started = time.perf_counter()
        run_agent("once", f"--vm.include={PATTERN}", "--format=prometheus")
        assert time.perf_counter() - started < 20
