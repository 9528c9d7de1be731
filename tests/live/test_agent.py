"""The agent on this host, over HTTP, with guests of our own: what an operator would see."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import own_mounts
from tests.agents import ROOT, AgentProcess, open_agent, run_agent, run_once_json
from tests.live import OTHER_EXITS, open_guest_process
from tests.own_mounts import UNMOUNT_ALL
from tests.waiting import wait_until

pytestmark = pytest.mark.live

UUID = "6f1c3c52-0d7a-4a4f-9a4e-0d8f9f2c7b11"
SOURCE = "--collector.source=stats_fd,debugfs"


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with open_agent(SOURCE) as agent:
        yield agent


def test_a_guest_shows_up_with_its_name_its_vcpus_and_its_exits(agent: AgentProcess) -> None:
    with open_guest_process(vcpus=2, name="web1", uuid=UUID, stats_fds=True, port_writes=23) as guest:
        vm = agent.find_vm(guest.pid)
        assert (vm["name"], vm["uuid"], vm["vm"], vm["vmm"]) == ("web1", UUID, f"{UUID}-{guest.pid}", "qemu")
        assert agent.samples("kvm_vcpu_notify_window_exits_total", vm=f"{UUID}-{guest.pid}") == {
            (("vcpu", "0"),): 0.0,
            (("vcpu", "1"),): 0.0,
        }
        before = agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{guest.pid}")
        guest.run(1000)
        after = agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{guest.pid}")
        assert all(1000 <= after[vcpu] - before[vcpu] <= 1000 + OTHER_EXITS for vcpu in before)
        assert agent.samples("kvm_vm_vcpus", vm=f"{UUID}-{guest.pid}") == {(): 2.0}
        assert agent.samples("kvm_vm_source_info", vm=f"{UUID}-{guest.pid}") == {(("source", "stats_fd"),): 1.0}
    assert agent.samples("kvm_vm_info", vm=f"{UUID}-{guest.pid}") == {}


def test_a_vm_that_cannot_be_read_is_there_without_numbers(agent: AgentProcess) -> None:
    if "[none]" in Path("/sys/kernel/security/lockdown").read_text():
        pytest.skip("without lockdown debugfs reads it")
    with open_guest_process(vcpus=2, style="firecracker", name="fc-1", port_writes=1) as guest:
        vm = agent.find_vm(guest.pid)["vm"]
        assert agent.samples("kvm_vm_vcpus", vm=vm) == {(): 2.0}
        for name in ("kvm_vcpu_exits_total", "kvm_vcpu_notify_window_exits_total", "kvm_vm_notify_window_exits_total"):
            assert agent.samples(name, vm=vm) == {}
        assert agent.samples("kvm_vm_source_info", vm=vm) == {}


def test_protection_is_what_kvm_says_of_this_host(agent: AgentProcess) -> None:
    supported = agent.samples("kvm_host_notify_supported")
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=1) as guest:
        states = agent.samples("kvm_vm_notify_protection", vm=agent.find_vm(guest.pid)["vm"])
        holding = [dict(labels)["state"] for labels, value in states.items() if value == 1]
        assert holding == (["unsupported"] if supported == {(): 0.0} else ["unknown"])
        assert len(states) == 4


def test_where_kvm_cannot_be_asked_protection_is_unknown_and_support_absent() -> None:
    """In a mount namespace of its own /dev/kvm is another device; the VMs are there all the same."""
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=1) as guest:
        script = (
            f"mount --bind /dev/null /dev/kvm && exec {sys.executable} -m exporter once --format=prometheus {SOURCE}"
        )
        run = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
    assert f'kvm_vm_notify_protection{{state="unknown",vm="{UUID}-{guest.pid}"}} 1\n' in run.stdout
    assert f'kvm_vm_notify_protection{{state="unsupported",vm="{UUID}-{guest.pid}"}} 0\n' in run.stdout
    assert "kvm_host_notify_supported" not in run.stdout


def test_hostile_names_and_clones_keep_every_vm_apart(agent: AgentProcess) -> None:
    name = 'a"b\\c\n{}%s %d\u202e<script>' + "x" * 60000
    with (
        open_guest_process(name=name, uuid=UUID, stats_fds=True, port_writes=1) as first,
        open_guest_process(name=name, uuid=UUID, stats_fds=True, port_writes=1) as second,
    ):
        one, two = agent.find_vm(first.pid), agent.find_vm(second.pid)
        assert [one["vm"], two["vm"]] == [f"{UUID}-{first.pid}", f"{UUID}-{second.pid}"]
        assert len(one["name"].encode()) <= 128
        assert one["name"].startswith('a"b\\c')
        assert agent.samples("kvm_vcpu_exits_total", vm=two["vm"])


def test_once_writes_a_file_for_the_textfile_collector(tmp_path: Path) -> None:
    output = tmp_path / "kvm.prom"
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=23) as guest:
        assert run_agent("once", SOURCE, f"--output={output}") == ""
        assert f'kvm_vcpu_exits_total{{vcpu="0",vm="{UUID}-{guest.pid}"}} 2' in output.read_text()
        assert os.listdir(tmp_path) == ["kvm.prom"]
        assert output.stat().st_mode & 0o777 == 0o644
        table = run_agent("once", SOURCE)
        assert [line.split()[0] for line in table.splitlines() if UUID in line] == [f"{UUID}-{guest.pid}"]
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
    with open_guest_process(stats_fds=True, port_writes=1):
        text = run_agent("check")
    assert re.search(r"^source stats_fd +works: ", text, re.MULTILINE)
    assert text.splitlines()[-1].split(maxsplit=1) == ["verdict", "the counters of this host can be read"]
    lockdown = Path("/sys/kernel/security/lockdown").read_text()
    if "[integrity]" in lockdown:
        assert "source debugfs" in text
        assert "the kernel's lockdown forbids reading counters in debugfs" in text
    if Path("/sys/module/kvm_pvm").exists():
        assert "KVM in software, without VMX or SVM" in text
        assert "not supported (KVM_CAP_X86_NOTIFY_VMEXIT is 0): the CPU shows no VMX" in text


def test_check_fails_where_no_vm_can_be_read() -> None:
    if "[none]" in Path("/sys/kernel/security/lockdown").read_text():
        pytest.skip("without lockdown debugfs reads it")
    with open_guest_process(style="firecracker", name="fc", port_writes=1) as guest:
        text = run_agent("check", "--collector.source=debugfs", expect=[1])
        assert "no source works" in text
        text = run_agent("check", SOURCE, expect=[0, 1])
        assert re.search(r"verdict +(the VM|\d+ of \d+ VMs) cannot be read: .*its VMM holds no stats fds", text)
        assert f'vm="{guest.pid}"' not in run_agent(
            "once", "--format=prometheus", "--collector.source=debugfs", expect=[1]
        )


def test_one_look_claims_nothing_about_what_moved() -> None:
    with open_guest_process(stats_fds=True, port_writes=1):
        text = run_agent("once", "--format=prometheus", SOURCE)
    assert "kvm_host_vms" in text
    assert "kvm_host_notify_window_exits_total" not in text


def test_the_agent_raises_its_own_limit_of_files() -> None:
    words = [
        "prlimit",
        "--nofile=256:8192",
        sys.executable,
        "-m",
        "exporter",
        "demo",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
        process.communicate()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == ["8192", "8192"]


def test_a_leader_thread_that_exits_later_does_not_hide_the_vm(agent: AgentProcess) -> None:
    code = """
import ctypes, fcntl, os, sys, threading
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
stats = fcntl.ioctl(vcpu, 0xAECE, 0)
def stay():
    while open(f"/proc/{os.getpid()}/stat").read().rpartition(")")[2].split()[0] != "Z":
        os.sched_yield()
    os.write(1, b"leader gone\\n")
    os.read(0, 1)
    os._exit(0)
os.write(1, b"ready\\n")
os.read(0, 1)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        vm = agent.find_vm(process.pid)["vm"]
        assert agent.samples("kvm_vcpu_exits_total", vm=vm) == {(("vcpu", "0"),): 0.0}
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.readline() == b"leader gone\n"
        assert agent.samples("kvm_vm_vcpus", vm=vm) == {(): 1.0}
        assert agent.samples("kvm_vcpu_exits_total", vm=vm) == {(("vcpu", "0"),): 0.0}
        process.communicate(b"x")


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
    assert "uid 65534, without CAP_BPF" in run.stdout
    assert "no source works: no counter of this host can be read" in run.stdout
    assert "processes whose fds may not be seen" in run.stdout


def test_vms_killed_while_they_are_scraped_cost_nothing_and_are_not_kept_alive(agent: AgentProcess) -> None:
    """200 VMs in turn, busy and idle ones, SIGKILLed during scrapes that never stop."""
    stop, failures, scrapes = threading.Event(), list[str](), 0
    seen: set[str] = set()

    def scrape_on_and_on() -> None:
        nonlocal scrapes
        while not stop.is_set():
            status, _headers, body = agent.get()
            families = {family.name: family for family in text_string_to_metric_families(body.decode())}
            successes = families["kvm_exporter_scrape_collector_success"].samples
            if status != 200 or {sample.value for sample in successes} != {1.0}:
                failures.append(f"{status} {successes}")
            if "kvm_vcpu_exits" in families:
                read = {sample.labels["vm"] for sample in families["kvm_vcpu_exits"].samples if sample.value > 0}
                infos = families["kvm_vm_info"].samples
                seen.update(sample.labels["pid"] for sample in infos if sample.labels["vm"] in read)
            scrapes += 1

    thread = threading.Thread(target=scrape_on_and_on)
    fds_before = agent.fds()
    thread.start()
    worst, killed = 0.0, set[str]()
    try:
        for busy in (True, False) * 10:
            guests = [open_guest_process(vcpus=2, stats_fds=True, port_writes=1) for _ in range(10)]
            opened = [guest.__enter__() for guest in guests]
            directories = [Path(f"/sys/kernel/debug/kvm/{guest.creator_tid}-{guest.vm_fd}") for guest in opened]
            assert all(directory.is_dir() for directory in directories)
            for guest in opened:
                if busy:
                    guest.send("loop")
            begun = scrapes
            while scrapes < begun + 2 and thread.is_alive():  # one whole scrape has seen them
                time.sleep(0.001)
            for guest in opened:
                guest.process.send_signal(signal.SIGKILL)
            for guest in opened:
                guest.process.wait()
            killed |= {str(guest.pid) for guest in opened}
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
    print(
        json.dumps(
            {
                "killed": len(killed),
                "seen": len(seen & killed),
                "scrapes": scrapes,
                "failed": 0,
                "longest_lived_seconds": round(worst, 3),
            }
        )
    )
    assert len(left) <= 2, left  # a connection that is being closed
    assert len(killed) >= 200
    assert len(seen & killed) >= 150
    assert scrapes >= 20


def test_json_and_http_agree(agent: AgentProcess) -> None:
    with open_guest_process(vcpus=3, uuid=UUID, stats_fds=True, port_writes=7) as guest:
        (vm,) = run_once_json(SOURCE)[guest.pid]
        over_http = agent.samples("kvm_vcpu_exits_total", vm=agent.find_vm(guest.pid)["vm"])
    vcpus = vm["vcpus"]
    assert isinstance(vcpus, list)
    assert over_http == {(("vcpu", str(vcpu["vcpu"])),): float(vcpu["exits"]) for vcpu in vcpus}
    assert [vcpu["tid"] for vcpu in vcpus] == [guest_vcpu.tid for guest_vcpu in guest.vcpus]


def test_on_a_machine_where_nothing_is_mounted_the_agent_reads_traces_and_mounts_nothing(tmp_path: Path) -> None:
    """None of tracefs, debugfs, securityfs and bpffs, as on a new machine."""
    script = f'{UNMOUNT_ALL}; ! mount | grep -E "tracefs|debugfs|securityfs|type bpf" && exec "$@"'
    bare = ["unshare", "--mount", "sh", "-c", script, "sh"]
    with open_guest_process(vcpus=2, name="bare", uuid=UUID, stats_fds=True, port_writes=23) as guest:
        with open_agent(prefix=bare) as agent:
            assert own_mounts.read_mounts(str(agent.pid)) == []
            assert agent.samples("kvm_exporter_source_up", source="bpf") == {(): 1.0}
            assert set(agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{guest.pid}")) == {
                (("vcpu", "0"),),
                (("vcpu", "1"),),
            }
            wait_until(lambda: agent.get_json("/api/v1/vcpus")["problem"] is None, "notify exits can be traced")
            assert agent.get_json("/api/v1/vcpus")["evidence"] == "trace"
            assert not [line for line in agent.log if "level=WARN" in line or "level=ERROR" in line]
            assert own_mounts.read_mounts(str(agent.pid)) == []
        said = run_agent("check", prefix=bare)
    lines = dict(line.split("  ", 1) for line in said.splitlines())
    assert (
        lines["stalls"].strip()
        == "can be told: exits can be traced, by a private instance of tracefs, as none is mounted"
    )
    assert "securityfs is not mounted: read through a private instance" in lines["lockdown"]
    assert "unknown" not in lines["security"]
