"""A drill with the real agent: the command, the line, the metric, the API, and the end of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from exporter.commands.drill import ask_for_drill
from exporter.stalls.drill import DRILL_SECONDS, Drill, NoDrill, find_vm
from exporter.stalls.verdicts import StallRule, State
from exporter.web.listeners import TcpAddress
from kvm.simulated.host import SimulatedHost
from tests.agents import ROOT, open_agent, run_agent
from tests.snapshots import make_reading, make_snapshot, make_unread


def test_a_drill_goes_the_way_of_a_stall_by_whatever_rule() -> None:
    for rule in (StallRule(), StallRule(2, 0.0), StallRule(1000, 600.0)):
        one = Drill(make_reading(), rule, 10_000.0)
        assert [report.verdict.state for report in one.begin(10_000.0)] == [
            State.NOTIFYING,
            State.SUSPECT,
            State.STALLED,
        ]
        assert one.report().verdict.state is State.STALLED
        assert one.ends_at == 10_000.0 + DRILL_SECONDS
        (end,) = one.end(10_060.0)
        assert (end.verdict.state, end.drill) == (State.RECOVERED, True)


def test_a_vm_is_found_by_its_id_or_its_name_if_that_is_one() -> None:
    web, other = make_reading("web", pid=1), make_reading("db", pid=2)
    twin = make_reading("web", pid=3)
    assert find_vm(make_snapshot(web, other), "web") is web
    assert find_vm(make_snapshot(web, twin), "uuid-3") is twin
    with pytest.raises(NoDrill, match="2 VMs are called 'web': give an id"):
        find_vm(make_snapshot(web, twin), "web")
    with pytest.raises(NoDrill, match="no VM is called"):
        find_vm(make_snapshot(web), "nobody")
    with pytest.raises(NoDrill, match="no VM is called ''"):
        find_vm(make_snapshot(web), "")
    with pytest.raises(NoDrill, match="cannot be read: its VMM holds no"):
        find_vm(make_snapshot(make_unread(pid=9)), "firecracker-9")


def test_the_command_raises_it_in_a_running_agent() -> None:
    with open_agent(command="demo") as agent:
        said = run_agent("drill", "--vm=gateway-1", f"--url={agent.socket}")
        assert "(gateway-1) is stalled for 60 s" in said
        (line,) = (line for line in agent.log if "DRILL, not real: vCPU makes no forward progress" in line)
        assert " drill=yes " in line
        vm = next(reading.vm.id for reading in SimulatedHost().read().readings if reading.vm.owner.name == "gateway-1")
        assert agent.samples("kvm_vcpu_drill") == {(("vcpu", "0"), ("vm", vm)): 1.0}
        assert 1.0 not in agent.samples("kvm_vcpu_no_forward_progress", vm=vm).values()
        drills = [vcpu for vcpu in agent.get_json("/api/v1/vcpus")["vcpus"] if vcpu["drill"]]
        assert [(vcpu["vm"], vcpu["state"]) for vcpu in drills] == [(vm, "stalled")]
        with pytest.raises(NoDrill, match="the last drill was just now"):
            ask_for_drill(agent.socket, "gateway-1")
        with pytest.raises(ValueError, match="want unix:PATH"):
            ask_for_drill(TcpAddress("127.0.0.1", agent.port), "x")


def test_without_an_agent_the_command_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "exporter", "drill", "--vm=x", "--url=unix:/nowhere/agent.sock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "No such file" in run.stderr
    assert "Traceback" not in run.stderr
