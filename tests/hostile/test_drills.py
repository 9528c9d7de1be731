"""Drills at the real agent: who may have one, how often, and that none covers what is real."""

from __future__ import annotations

import http.client
from collections.abc import Callable

import pytest

from exporter.commands.drill import ask_for_drill
from exporter.stalls.drill import NoDrill
from exporter.web.settings import DRILL_HEADER, DRILL_PATH
from tests.agents import open_agent
from tests.live import open_guest_process
from tests.waiting import wait_until

UUID = "5107a7ed-0000-4000-8000-00000000dddd"
REAL = ("kvm_vcpu_no_forward_progress", "kvm_host_vcpus_no_forward_progress", "kvm_vcpu_stall_start_timestamp_seconds")


def test_a_drill_covers_nothing_and_is_not_had_again_and_again(tell: Callable[[str], None]) -> None:
    with open_guest_process(uuid=UUID, vcpus=2, stats_fds=True, port_writes=1) as guest, open_agent() as agent:
        vm = f"{UUID}-{guest.pid}"
        wait_until(lambda: len(agent.samples("kvm_vcpu_exits_total", vm=vm)) == 2, "the guest is shown")
        # Before the monitor has tried to trace, what is real is not known.
        wait_until(lambda: agent.get_json("/api/v1/vcpus")["problem"] is None, "exits can be traced")
        before = [agent.samples(metric) for metric in REAL]
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)
            connection.request("POST", f"{DRILL_PATH}?vm={vm}", headers={DRILL_HEADER: "yes"})
            assert connection.getresponse().status == 403
            connection.close()
        assert agent.samples("kvm_vcpu_drill") == {}
        ask_for_drill(agent.socket, vm)
        refused = 0
        for _ in range(20):
            with pytest.raises(NoDrill):
                ask_for_drill(agent.socket, vm)
            refused += 1
        assert agent.samples("kvm_vcpu_drill") == {(("vcpu", "0"), ("vm", vm)): 1.0}
        assert [agent.samples(metric) for metric in REAL] == before
        tell(f"20 drills over TCP: 403 each; at the socket one had and {refused} refused; no real metric moved")
