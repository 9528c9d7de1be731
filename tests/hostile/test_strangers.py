"""New VMs among thousands of new processes, where no BPF finds them: KVM's uevent names the process."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.agents import AgentProcess, open_agent
from tests.hostile.strangers import open_strangers
from tests.live import open_guest_process

STRANGERS = 4000
SCRAPES = 2
# Discovery has a budget for each, so how many it takes is counted, at the distance that a Prometheus may have.
SCRAPE_INTERVAL_SECONDS = 1.0


def find_scrapes(agent: AgentProcess, pid: int) -> int:
    """After how many scrapes, one a second, a VM is there with both its vCPUs."""
    for number in range(1, 60):
        shown = [dict(labels) for labels in agent.samples("kvm_vm_info")]
        ids = [labels["vm"] for labels in shown if int(labels["pid"]) == pid]
        if ids and len(agent.samples("kvm_vcpu_exits_total", vm=ids[0])) == 2:
            return number
        time.sleep(SCRAPE_INTERVAL_SECONDS)
    raise AssertionError("not found within a minute")


def test_a_vm_among_4000_new_processes_is_found_within_two_scrapes(tell: Callable[[str], None]) -> None:
    with open_agent("--collector.source=stats_fd") as agent, open_strangers(STRANGERS):
        found = []
        for _ in range(3):
            with open_guest_process(vcpus=2, stats_fds=True, port_writes=1) as guest:
                found.append(find_scrapes(agent, guest.pid))
        tell(f"without bpf, new VMs among {STRANGERS:,} new processes: found at scrapes {found}")
        assert max(found) <= SCRAPES
