"""The real agent holds what its flags need on this host, and nothing else: in each thread and in what it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from kvm import abi
from kvm.host.privileges import read_privileges
from tests.agents import ROOT, AgentProcess, open_agent
from tests.blind import refuse_syscalls
from tests.blind.surfaces import make_stage
from tests.blind.surfaces import open_agent as open_blind_agent
from tests.blind.ways import Way
from tests.live import open_guest_process
from tests.own_mounts import UNMOUNT_ALL
from tests.waiting import wait_until

pytestmark = [pytest.mark.live, pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to drop")]

FIVE = ("CAP_BPF", "CAP_PERFMON", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
NARROW = ("--collector.source=stats_fd", "--no-trigger.bpf")
SAID = "capabilities that no flag needs are given up"


def find_needed(*features: str) -> set[str]:
    """What these features need; that these are the rows, and none too large, tests/live/test_capabilities.py shows."""
    return {name for feature in read_privileges().find_features() if feature.name in features for name in feature.needs}


def read_sets(status: Path) -> dict[str, str]:
    return dict(re.findall(r"^(Cap(?:Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs):\s*(\w+)$", status.read_text(), re.MULTILINE))


def find_held(agent: AgentProcess) -> dict[str, set[str]]:
    """The capabilities that any thread of the agent, or of a program that it runs, has; by the set that has them."""
    found: dict[str, set[str]] = {name: set() for name in ("CapPrm", "CapEff", "CapBnd")}
    processes = [agent.pid, *(child.pid for child in psutil.Process(agent.pid).children(recursive=True))]
    assert len(processes) > 1 or "demo" in Path(f"/proc/{agent.pid}/cmdline").read_text(), "it looks up owners"
    names = {number: name for name, number in vars(abi).items() if re.match("CAP_[A-Z]", name)}
    for pid in processes:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            sets = read_sets(status)
            assert sets["NoNewPrivs"] == "1"
            for kind in found:
                bits = int(sets[kind], 16)
                found[kind] |= {names.get(number, str(number)) for number in range(64) if bits >> number & 1}
    return found


def wait_owned(agent: AgentProcess, name: str) -> None:
    """Wait until the owner of a VM has been looked up."""
    wait_until(lambda: any(dict(labels)["name"] == name for labels in agent.samples("kvm_vm_info")), "it is shown")


@pytest.mark.parametrize(
    ("flags", "features"),
    [
        ((), ("source bpf", "source stats_fd", "source debugfs", "owners", "trigger", "RIPs", "lockdown")),
        (NARROW, ("source stats_fd", "owners", "RIPs", "lockdown")),
        (("--collector.source=bpf",), ("source bpf", "owners", "trigger", "RIPs", "lockdown")),
    ],
)
def test_root_keeps_what_the_flags_need(flags: tuple[str, ...], features: tuple[str, ...]) -> None:
    needed = find_needed(*features)
    with open_guest_process(name="kept", stats_fds=True, port_writes=1) as guest, open_agent(*flags) as agent:
        wait_owned(agent, "kept")
        assert find_held(agent) == {"CapPrm": needed, "CapEff": needed, "CapBnd": needed}
        assert agent.samples("kvm_vcpu_exits_total", vm=f"qemu-{guest.pid}")
        (line,) = (line for line in agent.log if SAID in line)
    for name in needed:
        assert name in line


def test_what_listening_needs_is_kept(tmp_path: Path) -> None:
    with open_agent(f"--web.listen-address=unix:{tmp_path}/s", "--web.details-group=4242", command="demo") as agent:
        assert find_held(agent)["CapEff"] == {"CAP_CHOWN"}
        assert (tmp_path / "s").stat().st_gid == 4242
    with open_agent(command="demo") as agent:
        assert find_held(agent) == {"CapPrm": set(), "CapEff": set(), "CapBnd": set()}


def test_a_port_of_root_can_be_listened_at() -> None:
    # In a network of its own, where nobody else has that port.
    words = ["unshare", "--net", sys.executable, "-m", "exporter", "demo", "--web.listen-address=127.0.0.1:80"]
    lines = []
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "msg=listening" in line or "cannot" in line:
                break
        process.terminate()
    assert any("msg=listening address=127.0.0.1:80\n" in line for line in lines), lines
    assert any(SAID in line and "kept=CAP_NET_BIND_SERVICE " in line for line in lines), lines


def test_where_nothing_is_mounted_it_can_still_mount_for_itself() -> None:
    """With a VM that it sees: without, and without debugfs, one that may not see a process's fds is rightly blind."""
    bare = ("unshare", "--mount", "sh", "-c", f'{UNMOUNT_ALL}; exec "$@"', "sh")
    with open_guest_process(name="seen", stats_fds=True), open_agent(*NARROW, prefix=bare) as agent:
        wait_until(lambda: agent.get_json("/api/v1/vcpus")["problem"] is None, "exits can be traced")
        assert "CAP_SYS_ADMIN" in find_held(agent)["CapEff"]
        assert agent.samples("kvm_host_info")


def test_a_user_of_its_own_gives_up_what_it_was_given_too_much() -> None:
    needed = find_needed("source stats_fd", "owners", "RIPs", "lockdown") | {"CAP_DAC_READ_SEARCH"}
    way = Way(name="all five", held=FIVE, sources="stats_fd", more_flags=("--no-trigger.bpf",))
    with (
        tempfile.TemporaryDirectory() as directory,
        open_guest_process(name="kept", stats_fds=True, port_writes=1),
        open_blind_agent(way, make_stage(Path(directory))) as agent,
    ):
        wait_owned(agent, "kept")
        held = find_held(agent)
        (line,) = (line for line in agent.log if SAID in line)
    assert held == {"CapPrm": needed, "CapEff": needed, "CapBnd": set(FIVE)}
    assert "it takes CAP_SETPCAP" in line


def test_where_it_is_not_allowed_to_it_says_so_and_serves() -> None:
    prefix = (sys.executable, str(Path(refuse_syscalls.__file__)), "capset")
    with open_agent(prefix=prefix) as agent:
        (line,) = (line for line in agent.log if "capabilities are not given up" in line)
        assert agent.get()[0] == 200
    assert "capset" in line
    assert "level=WARN" in line
