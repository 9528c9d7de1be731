"""The agent where the host's /proc, /sys and root are somewhere else, as a container may see them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.host.paths import HostPaths
from tests.agents import ROOT, AgentProcess, open_agent, run_agent
from tests.live import GuestProcess, open_guest_process
from tests.waiting import wait_until

pytestmark = [pytest.mark.live, pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")]

NAME = "instance-0000002a"
# The host's file systems below $0; in their usual places are a /proc of processes alone, and a /sys with nothing
# mounted below it. (libbpf itself asks /sys for the CPUs, which every container has.)
CONTAINER = """
mount --rbind /proc "$0/proc" && mount --rbind /sys "$0/sys" &&
mount -t proc -o subset=pid proc /proc && mount -t tmpfs tmpfs /sys && mount -t sysfs sysfs /sys && exec "$@"
"""


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    """Where a container has the host's file systems; its root has nothing but what libvirt writes."""
    for name in ("proc", "sys", "root/run/libvirt/qemu"):
        (tmp_path / name).mkdir(parents=True)
    return HostPaths(tmp_path / "proc", tmp_path / "sys", tmp_path / "root")


@pytest.fixture
def guest(host: HostPaths) -> Iterator[GuestProcess]:
    """A VM of which the host's libvirt knows the project."""
    with open_guest_process(name=NAME, stats_fds=True, port_writes=100) as guest:
        status = (ROOT / "tests/fixtures/owners/libvirt-openstack/status.xml").read_text()
        status = re.sub(r"(<domstatus [^>]*pid=)'\d+'", rf"\1'{guest.pid}'", status)
        path = host.libvirt_directories[0] / f"{NAME}.xml"
        path.write_text(status)
        for place in (path.parent, path):
            place.chmod(0o700)
        yield guest


def find_named(agent: AgentProcess) -> list[dict[str, str]]:
    """The labels of the guest's kvm_vm_info, if it is known by its name."""
    return [found for labels in agent.samples("kvm_vm_info") if (found := dict(labels))["name"] == NAME]


def find_flags(host: HostPaths) -> tuple[str, ...]:
    return (f"--path.procfs={host.procfs}", f"--path.sysfs={host.sysfs}", f"--path.rootfs={host.rootfs}")


def find_container(host: HostPaths, *words: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "--propagation=private", *words, "sh", "-c", CONTAINER, str(host.procfs.parent))


def test_all_that_a_host_has_is_found_where_it_is(host: HostPaths, guest: GuestProcess) -> None:
    def find_up() -> dict[tuple[tuple[str, str], ...], float]:
        return agent.samples("kvm_exporter_source_up")

    with open_agent() as agent:
        up, info = find_up(), agent.samples("kvm_host_info")
        told = agent.get_json("/api/v1/vcpus")
    with open_agent(*find_flags(host), prefix=find_container(host)) as agent:
        wait_until(lambda: find_named(agent), "the VM is known")
        (labels,) = find_named(agent)
        assert (labels["identity"], labels["pid"]) == ("libvirt", str(guest.pid))
        assert labels["project"] != ""
        assert find_up() == up
        assert agent.samples("kvm_host_info") == info != {}
        wait_until(
            lambda: agent.get_json("/api/v1/vcpus")["problem"] == told["problem"], lambda: f"traced: {agent.log}"
        )


def test_without_the_flags_most_of_it_is_missing(host: HostPaths, guest: GuestProcess) -> None:
    """So what the flags are needed for is really not to be had in the usual places."""
    with open_agent(prefix=find_container(host)) as agent:
        assert agent.samples("kvm_host_info") == {}
        assert {labels["project"] for labels in find_named(agent)} <= {""}


def test_check_and_once_take_them_too(host: HostPaths, guest: GuestProcess) -> None:
    """Whether all VMs of the machine are seen, which the exit code says, is others' matter too."""
    words, prefix = find_flags(host), find_container(host)
    document = json.loads(run_agent("once", "--format=json", *words, prefix=prefix, expect=(0, 1)))
    (vm,) = (vm for vm in document["vms"] if vm["pid"] == guest.pid)
    assert (vm["identity"], len(vm["vcpus"])) == ("libvirt", 1)
    report = run_agent("check", *words, prefix=prefix, expect=(0, 1))
    assert "source bpf           works" in report
    assert "CPU unknown" not in report


def test_a_hosts_proc_is_no_pid_namespace_of_the_hosts(host: HostPaths, guest: GuestProcess) -> None:
    """Numbers in it are not those of system calls: the agent must not take VMs for seen, whatever it can read."""
    prefix = find_container(host, "--pid", "--fork", "--kill-child")
    document = json.loads(run_agent("once", "--format=json", *find_flags(host), prefix=prefix, expect=(1,)))
    assert document["complete"] is False
    assert "pid_namespace" in {spot["reason"] for spot in document["blind_spots"]}


@pytest.mark.parametrize("words", ["--path.procfs=proc", "--path.sysfs=/nowhere", "--path.rootfs=/etc/passwd"])
def test_what_is_no_directory_is_refused(words: str) -> None:
    command = [sys.executable, "-m", "exporter", "check", words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert "the absolute path of a directory is wanted" in run.stderr
