"""VMs that claim to be others: by name, by UUID, by a libvirt status that their own user has written."""

from __future__ import annotations

from collections.abc import Callable

from tests.agents import AgentProcess, open_agent
from tests.hostile.impostor import NOBODY, open_impostor
from tests.live import open_guest_process
from tests.waiting import wait_until

NAME, UUID = "shop-db", "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"


def find_labels(agent: AgentProcess, metric: str, pid: int) -> dict[str, str]:
    found = [dict(labels) for labels in agent.samples(metric)]
    return next((labels for labels in found if labels.get("pid") == str(pid)), {})


def test_an_impostor_takes_neither_id_nor_owner(tell: Callable[[str], None]) -> None:
    with (
        open_agent() as agent,
        open_impostor(NAME, UUID) as impostor,
        open_guest_process(name=NAME, uuid=UUID, stats_fds=True, port_writes=1) as victim,
    ):
        wait_until(lambda: find_labels(agent, "kvm_vm_info", victim.pid), "the victim is shown")
        claimed, honest = (find_labels(agent, "kvm_vm_info", pid) for pid in (impostor, victim.pid))
        assert claimed["vm"] == f"{UUID}-{impostor}"
        assert honest["vm"] == f"{UUID}-{victim.pid}"
        assert (claimed["project"], claimed["vm_namespace"], claimed["display_name"]) == ("", "", "")
        assert claimed["identity"] in ("cmdline", "claimed")
        assert (claimed["uid"], honest["uid"]) == (str(NOBODY), "0")
        assert len(agent.samples("kvm_vcpu_exits_total", vm=honest["vm"])) == 1
        tell(f"a VM with another's name, UUID and a status of its own: identity={claimed['identity']}, no owner")
