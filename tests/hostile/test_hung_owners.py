"""VMs whose owner cannot be looked up, because that hangs in the kernel: nobody else waits, and nothing else hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from tests.agents import AgentProcess, open_agent, run_agent
from tests.hostile.hung_owner import open_hung_owners
from tests.live import open_guest_process
from tests.waiting import wait_until

HUNG = 33
STOP_SECONDS = 2.0


def is_shown(agent: AgentProcess, name: str) -> bool:
    return any(("name", name) in labels for labels in agent.samples("kvm_vm_info"))


def test_33_look_ups_that_hang_cost_nobody_a_name_and_the_agent_ends(tell: Callable[[str], None]) -> None:
    with open_agent() as agent, open_hung_owners(HUNG):
        agent.get()
        seconds = []
        for name in ("late-1", "late-2", "late-3"):
            with open_guest_process(name=name, stats_fds=True, port_writes=1):
                wait_until(partial(is_shown, agent, name), "an honest VM has its name")
                started = time.perf_counter()
                agent.get()
                seconds.append(time.perf_counter() - started)
        assert (("reason", "owners_pending"),) in agent.samples("kvm_exporter_incomplete_reason_info")
        started = time.perf_counter()
        assert agent.close() == 0
        stopped = time.perf_counter() - started
        tell(
            f"{HUNG} VMs whose lookup hangs: 3 VMs that come later have their names, scrape {max(seconds):.2f} s, "
            f"stopped in {stopped:.2f} s"
        )
        assert stopped < STOP_SECONDS


def test_new_processes_of_that_user_do_not_slow_every_scrape_down() -> None:
    """Each of them was waited for, once; with a new one each second, so was each scrape."""
    with open_agent() as agent, open_hung_owners(4):
        agent.get()
        seconds = []
        for _ in range(6):
            with open_hung_owners(1):
                started = time.perf_counter()
                agent.get()
                seconds.append(time.perf_counter() - started)
        assert sorted(seconds)[2] < 0.5, seconds


def test_check_does_not_promise_what_lookups_leave_no_fd_for() -> None:
    """What it tries, it tries as ``serve`` does: while lookups hang, and the sources are open."""
    with open_hung_owners(HUNG):
        said = run_agent("check", "--collector.source=stats_fd", expect=(1,), prefix=("prlimit", "--nofile=18:18"))
    (stalls,) = [line for line in said.splitlines() if line.startswith("stalls")]
    assert "cannot be told" in stalls
    assert "raise the service's limit of open files" in stalls
