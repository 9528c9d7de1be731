"""The agent on this host, over HTTP, with guests of our own: what an operator would see."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import ROOT, AgentProcess, open_agent, run_agent, run_once_json
from tests.live import open_guest_process

pytestmark = pytest.mark.live

UUID = "6f1c3c52-0d7a-4a4f-9a4e-0d8f9f2c7b11"
SOURCE = "--collector.source=stats_fd,debugfs"


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with open_agent(SOURCE) as agent:
        yield agent


def find_vm(agent: AgentProcess, pid: int) -> dict[str, str]:
    infos = agent.scrape()["kvm_vm_info"].samples
    (labels,) = (sample.labels for sample in infos if sample.labels["pid"] == str(pid))
    return labels


def test_a_guest_shows_up_with_its_name_its_vcpus_and_its_exits(agent: AgentProcess) -> None:
    with open_guest_process(vcpus=2, name="web1", uuid=UUID, stats_fds=True, port_writes=23) as guest:
        vm = find_vm(agent, guest.pid)
        assert (vm["name"], vm["uuid"], vm["vm"], vm["vmm"]) == ("web1", UUID, UUID, "qemu")
        assert agent.samples("kvm_vcpu_notify_window_exits_total", vm=UUID) == {
            (("vcpu", "0"),): 0.0,
            (("vcpu", "1"),): 0.0,
        }
        before = agent.samples("kvm_vcpu_exits_total", vm=UUID)
        guest.run(1000)
        after = agent.samples("kvm_vcpu_exits_total", vm=UUID)
        assert all(1000 <= after[vcpu] - before[vcpu] <= 1010 for vcpu in before)
        assert agent.samples("kvm_vm_vcpus", vm=UUID) == {(): 2.0}
        assert agent.samples("kvm_vm_source_info", vm=UUID) == {(("source", "stats_fd"),): 1.0}
    assert agent.samples("kvm_vm_info", vm=UUID) == {}


def test_a_vm_that_cannot_be_read_is_there_without_numbers(agent: AgentProcess) -> None:
    if "[none]" in Path("/sys/kernel/security/lockdown").read_text():
        pytest.skip("without lockdown debugfs reads it")
    with open_guest_process(vcpus=2, style="firecracker", name="fc-1", port_writes=1) as guest:
        vm = find_vm(agent, guest.pid)["vm"]
        assert agent.samples("kvm_vm_vcpus", vm=vm) == {(): 2.0}
        for name in ("kvm_vcpu_exits_total", "kvm_vcpu_notify_window_exits_total", "kvm_vm_notify_window_exits_total"):
            assert agent.samples(name, vm=vm) == {}
        assert agent.samples("kvm_vm_source_info", vm=vm) == {}


def test_protection_is_what_kvm_says_of_this_host(agent: AgentProcess) -> None:
    supported = agent.samples("kvm_host_notify_supported")
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=1):
        states = agent.samples("kvm_vm_notify_protection", vm=UUID)
        holding = [dict(labels)["state"] for labels, value in states.items() if value == 1]
        assert holding == (["unsupported"] if supported == {(): 0.0} else ["unknown"])
        assert len(states) == 4


def test_where_kvm_cannot_be_asked_protection_is_unknown_and_support_absent() -> None:
    """In a mount namespace of its own /dev/kvm is another device; the VMs are there all the same."""
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=1):
        script = (
            f"mount --bind /dev/null /dev/kvm && exec {sys.executable} -m exporter once --format=prometheus {SOURCE}"
        )
        run = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
    assert f'kvm_vm_notify_protection{{state="unknown",vm="{UUID}"}} 1\n' in run.stdout
    assert f'kvm_vm_notify_protection{{state="unsupported",vm="{UUID}"}} 0\n' in run.stdout
    assert "kvm_host_notify_supported" not in run.stdout


def test_hostile_names_and_clones_keep_every_vm_apart(agent: AgentProcess) -> None:
    name = 'a"b\\c\n{}%s %d\u202e<script>' + "x" * 60000
    with (
        open_guest_process(name=name, uuid=UUID, stats_fds=True, port_writes=1) as first,
        open_guest_process(name=name, uuid=UUID, stats_fds=True, port_writes=1) as second,
    ):
        one, two = find_vm(agent, first.pid), find_vm(agent, second.pid)
        assert {one["vm"], two["vm"]} == {UUID, f"{UUID}-{second.pid}"}
        assert len(one["name"]) <= 256
        assert one["name"].startswith('a"b\\c')
        assert agent.samples("kvm_vcpu_exits_total", vm=two["vm"])
        assert agent.samples("kvm_exporter_read_errors_total", source="owners", kind="duplicate")[()] >= 1
    assert any('msg="VM left out"' in line or "kind=duplicate" in line for line in agent.log)


def test_once_writes_a_file_for_the_textfile_collector(tmp_path: Path) -> None:
    output = tmp_path / "kvm.prom"
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=23):
        assert run_agent("once", SOURCE, f"--output={output}") == ""
        assert f'kvm_vcpu_exits_total{{vcpu="0",vm="{UUID}"}} 2' in output.read_text()
        assert os.listdir(tmp_path) == ["kvm.prom"]
        assert output.stat().st_mode & 0o777 == 0o644
        table = run_agent("once", SOURCE)
        assert [line.split()[0] for line in table.splitlines() if UUID in line] == [UUID]
    run_agent("once", f"--output={tmp_path}/kvm.txt", expect=[2])
    assert run_agent("once", f"--output={tmp_path}/nowhere/kvm.prom", expect=[1]) == ""


def test_promtool_finds_nothing_wrong_with_what_a_real_host_says(agent: AgentProcess) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "Debian's package prometheus has it"
    with open_guest_process(vcpus=2, name="web1", uuid=UUID, stats_fds=True, port_writes=1):
        _status, _headers, body = agent.get()
    run = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_check_explains_this_machine() -> None:
    text = run_agent("check", expect=[0, 1])
    lockdown = Path("/sys/kernel/security/lockdown").read_text()
    if "[integrity]" in lockdown:
        assert "source debugfs" in text
        assert "does not work: the kernel's lockdown forbids reading counters" in text
    if Path("/sys/module/kvm_pvm").exists():
        assert "KVM in software, without VMX or SVM" in text
        assert "not supported (KVM_CAP_X86_NOTIFY_VMEXIT is 0): the CPU shows no VMX" in text
    assert text.splitlines()[-1].startswith("verdict")


def test_an_unprivileged_agent_says_what_it_cannot_see() -> None:
    run = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "exporter", "check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ermission denied" in run.stderr and not run.stdout:
        pytest.skip(f"the interpreter cannot be run by another user: {run.stderr[-200:]}")
    assert run.returncode == 1, run.stderr
    assert "uid 65534, without CAP_SYS_PTRACE" in run.stdout
    assert "not every process of this host can be seen" in run.stdout


def test_vms_killed_while_they_are_scraped_cost_nothing_and_are_not_kept_alive(agent: AgentProcess) -> None:
    """200 VMs in turn, busy and idle ones, SIGKILLed during scrapes that never stop."""
    stop, failures, scrapes = threading.Event(), list[str](), 0

    def scrape_on_and_on() -> None:
        nonlocal scrapes
        while not stop.is_set():
            status, _headers, body = agent.get()
            families = body.count(b'kvm_exporter_scrape_collector_success{collector="')
            if status != 200 or body.count(b"} 1\n") == 0 or families < 5 or b'_success{collector="look"} 0' in body:
                failures.append(f"{status} {body[:200]!r}")
            scrapes += 1

    thread = threading.Thread(target=scrape_on_and_on)
    fds_before = agent.fds()
    thread.start()
    worst, killed = 0.0, 0
    try:
        for busy in (True, False) * 10:
            guests = [open_guest_process(vcpus=2, stats_fds=True, port_writes=1) for _ in range(10)]
            opened = [guest.__enter__() for guest in guests]
            directories = [Path(f"/sys/kernel/debug/kvm/{guest.creator_tid}-{guest.vm_fd}") for guest in opened]
            assert all(directory.is_dir() for directory in directories)
            for guest in opened:
                if busy:
                    guest.send("loop")
            for guest in opened:
                guest.process.send_signal(signal.SIGKILL)
            for guest in opened:
                guest.process.wait()
            killed += len(opened)
            ended = time.monotonic()
            while any(directory.exists() for directory in directories):
                assert time.monotonic() < ended + 5
            worst = max(worst, time.monotonic() - ended)
            for manager in guests:
                manager.__exit__(None, None, None)
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert worst < 1.0
    agent.get()
    left = agent.fds() - fds_before
    print(json.dumps({"killed": killed, "scrapes": scrapes, "failed": 0, "longest_lived_seconds": round(worst, 3)}))
    assert len(left) <= 2, left  # a connection that is being closed
    assert killed >= 200
    assert scrapes >= 20


def test_json_and_http_agree(agent: AgentProcess) -> None:
    with open_guest_process(vcpus=3, uuid=UUID, stats_fds=True, port_writes=7) as guest:
        (vm,) = run_once_json(SOURCE)[guest.pid]
        over_http = agent.samples("kvm_vcpu_exits_total", vm=UUID)
    vcpus = vm["vcpus"]
    assert isinstance(vcpus, list)
    assert over_http == {(("vcpu", str(vcpu["vcpu"])),): float(vcpu["exits"]) for vcpu in vcpus}
    assert [vcpu["tid"] for vcpu in vcpus] == [guest_vcpu.tid for guest_vcpu in guest.vcpus]
