"""Real QEMUs under KVM, scraped over HTTP: Debian's 7.2, which holds no stats fds, and 10.x, which does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.agents import AgentProcess, open_agent, run_agent, run_once_json
from tests.lab.debian import find_qemu10
from tests.live import OTHER_EXITS, open_guest_process
from tests.live.libvirt_daemon import Libvirt, find_missing, render_nova_metadata, running_libvirt
from tests.qmp_statistics import keep_statistics, read_expected_series
from tests.waiting import wait_until

pytestmark = pytest.mark.live

UUID = "0a8c6f0e-53f4-4f0e-8f43-3b1f3a9a7d10"
PROJECT = "5f2b3c3e8d0b4c8f9f6f2a7f3f1c0001"
SOURCE = "--collector.source=stats_fd,debugfs"
GROW_SECONDS = 60


class Qemu:
    """A running QEMU with its QMP socket."""

    def __init__(self, pid: int, qmp: socket.socket) -> None:
        self.pid = pid
        self._lines = qmp.makefile("rw")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> object:
        """Run a QMP command and return its result; events are passed over."""
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        for line in self._lines:
            answer = json.loads(line)
            if "return" in answer or "error" in answer:
                assert "return" in answer, answer
                return answer["return"]
        raise AssertionError("QEMU has ended")


@contextmanager
def open_qemu(binary: str | Path, name: str, directory: Path, smp: str = "2") -> Iterator[Qemu]:
    """Run a QEMU whose firmware runs and finds nothing to boot."""
    path = directory / "qmp"
    words = [str(binary), "-accel", "kvm", "-smp", smp, "-m", "64", "-nodefaults", "-display", "none"]
    words += ["-name", f"guest={name.replace(',', ',,')},debug-threads=on", "-uuid", UUID]
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(60)
        words += ["-chardev", f"socket,id=qmp,path={path}", "-mon", "chardev=qmp,mode=control"]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
            try:
                qmp, _address = listener.accept()
                with qmp:
                    yield Qemu(process.pid, qmp)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with open_agent(SOURCE) as agent:
        yield agent


@pytest.fixture
def qemu72() -> str:
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        pytest.skip("Debian's package qemu-system-x86 is not installed")
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    if "version 7." not in version:
        pytest.skip(f"not the QEMU 7.2 of Debian 12: {version.splitlines()[0]}")
    return binary


def test_qemu_10_has_two_series_a_counter_and_its_exits_grow(agent: AgentProcess, tmp_path: Path) -> None:
    name = 'we,b "one"'
    with open_qemu(find_qemu10(), name, tmp_path) as qemu:
        assert agent.find_vm(qemu.pid)["name"] == name
        notify = agent.samples("kvm_vcpu_notify_window_exits_total", vm=f"{UUID}-{qemu.pid}")
        assert set(notify) == {(("vcpu", "0"),), (("vcpu", "1"),)}
        before = agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{qemu.pid}")[(("vcpu", "0"),)]
        wait_until(
            lambda: agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{qemu.pid}")[(("vcpu", "0"),)] > before,
            "exits of the firmware",
            GROW_SECONDS,
        )


def test_threads_of_qemu_10_are_those_that_it_tells_over_qmp(tmp_path: Path) -> None:
    with open_qemu(find_qemu10(), "web", tmp_path, smp="4,sockets=2,cores=1,threads=2") as qemu:
        (vm,) = run_once_json(SOURCE)[qemu.pid]
        told = qemu.ask("query-cpus-fast")
    assert isinstance(told, list)
    vcpus = vm["vcpus"]
    assert isinstance(vcpus, list)
    assert {vcpu["vcpu"]: vcpu["tid"] for vcpu in vcpus} == {cpu["cpu-index"]: cpu["thread-id"] for cpu in told}


def test_numbers_are_qemus_own_where_apic_ids_have_holes(tmp_path: Path) -> None:
    """Three cores a socket: the APIC ids are 0, 1, 2, 4, 5, 6; the guest's CPUs are 0 to 5."""
    with open_qemu(find_qemu10(), "holes", tmp_path, smp="6,sockets=2,cores=3,threads=1") as qemu:
        (vm,) = run_once_json(SOURCE)[qemu.pid]
    vcpus = vm["vcpus"]
    assert isinstance(vcpus, list)
    assert [(vcpu["vcpu"], vcpu["vcpu_id"]) for vcpu in vcpus] == [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)]


def test_a_plugged_in_vcpu_is_found(tmp_path: Path) -> None:
    with open_qemu(find_qemu10(), "plug", tmp_path, smp="1,maxcpus=2") as qemu:
        (before,) = run_once_json(SOURCE)[qemu.pid]
        slots = qemu.ask("query-hotpluggable-cpus")
        assert isinstance(slots, list)
        (free,) = (slot for slot in slots if "qom-path" not in slot)
        qemu.ask("device_add", driver=free["type"], id="plugged", **free["props"])
        (after,) = run_once_json(SOURCE)[qemu.pid]
    assert (before["vcpu_count"], after["vcpu_count"]) == (1, 2)
    vcpus = after["vcpus"]
    assert isinstance(vcpus, list)
    assert [vcpu["vcpu"] for vcpu in vcpus] == [0, 1]


def test_qemu_72_is_listed_with_its_vcpus_and_has_no_numbers_under_lockdown(
    agent: AgentProcess, qemu72: str, tmp_path: Path
) -> None:
    if "[none]" in Path("/sys/kernel/security/lockdown").read_text():
        pytest.skip("without lockdown debugfs reads it")
    with open_qemu(qemu72, "old", tmp_path) as qemu:
        assert agent.find_vm(qemu.pid)["name"] == "old"
        assert agent.samples("kvm_vm_vcpus", vm=f"{UUID}-{qemu.pid}") == {(): 2.0}
        assert agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{qemu.pid}") == {}
        assert agent.samples("kvm_vcpu_notify_window_exits_total", vm=f"{UUID}-{qemu.pid}") == {}
        assert agent.samples("kvm_vm_notify_window_exits_total", vm=f"{UUID}-{qemu.pid}") == {}


@pytest.fixture(scope="module")
def bpf_agent() -> Iterator[AgentProcess]:
    with open_agent() as agent:
        if agent.samples("kvm_exporter_source_up", source="bpf") != {(): 1.0}:
            pytest.skip(f"bpf does not work here: {agent.log}")
        yield agent


def test_by_ebpf_qemu_72_has_every_series_under_lockdown(bpf_agent: AgentProcess, qemu72: str, tmp_path: Path) -> None:
    with open_qemu(qemu72, "old", tmp_path) as qemu:
        bpf_agent.find_vm(qemu.pid)
        assert bpf_agent.samples("kvm_vm_source_info", vm=f"{UUID}-{qemu.pid}") == {(("source", "bpf"),): 1.0}
        notify = bpf_agent.samples("kvm_vcpu_notify_window_exits_total", vm=f"{UUID}-{qemu.pid}")
        assert set(notify) == {(("vcpu", "0"),), (("vcpu", "1"),)}
        assert bpf_agent.samples("kvm_vm_notify_window_exits_total", vm=f"{UUID}-{qemu.pid}") == {(): 0.0}
        before = bpf_agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{qemu.pid}")[(("vcpu", "0"),)]
        wait_until(
            lambda: bpf_agent.samples("kvm_vcpu_exits_total", vm=f"{UUID}-{qemu.pid}")[(("vcpu", "0"),)] > before,
            "exits of the firmware",
            GROW_SECONDS,
        )


def test_by_ebpf_a_vmm_without_statistics_fds_has_every_series(bpf_agent: AgentProcess) -> None:
    with open_guest_process(vcpus=3, style="firecracker", name="fc-7", port_writes=23) as guest:
        assert bpf_agent.find_vm(guest.pid)["vm"] == f"fc-7-{guest.pid}"
        assert bpf_agent.samples("kvm_vm_source_info", vm=f"fc-7-{guest.pid}") == {(("source", "bpf"),): 1.0}
        exits = bpf_agent.samples("kvm_vcpu_exits_total", vm=f"fc-7-{guest.pid}")
        assert len(exits) == 3
        assert all(23 <= value <= 23 + OTHER_EXITS for value in exits.values())


@pytest.fixture
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    if reason := find_missing():
        pytest.skip(reason)
    with running_libvirt(tmp_path_factory.mktemp("lv"), find_qemu10()) as daemon:
        yield daemon


def test_exits_lie_between_two_readings_of_libvirt(agent: AgentProcess, libvirt: Libvirt) -> None:
    name = "instance-0000002b"
    pid = libvirt.start_domain(name, UUID, metadata=render_nova_metadata("web", PROJECT, "payments"))
    # It runs as root in a container of its own, where it could have written libvirt's status: a claim.
    vm = f"{UUID}-{pid}"
    info = agent.find_vm(pid)
    assert [info[label] for label in ("name", "project", "identity", "uid")] == [name, "", "claimed", "0"]
    (claims,) = agent.samples("kvm_vm_claimed_info", vm=vm)
    assert [dict(claims)[label] for label in ("project", "display_name")] == [PROJECT, "web"]
    wait_until(
        lambda: all(libvirt.read_vcpu_statistics(name).get(f"vcpu.{vcpu}.exits.sum") for vcpu in (0, 1)),
        "exits of the firmware",
        GROW_SECONDS,
    )
    before = libvirt.read_vcpu_statistics(name)
    ours = agent.samples("kvm_vcpu_exits_total", vm=vm)
    after = libvirt.read_vcpu_statistics(name)
    for vcpu in ("0", "1"):
        key = f"vcpu.{vcpu}.exits.sum"
        assert 0 < before[key] <= ours[(("vcpu", vcpu),)] <= after[key]


@pytest.mark.parametrize("source", ["bpf", "stats_fd"])
def test_every_statistic_is_what_qemu_itself_reads(source: str, tmp_path: Path) -> None:
    flags = ("--collector.stats", "--collector.stats.level=vcpu", f"--collector.source={source}")
    with open_qemu(find_qemu10(), "web", tmp_path) as qemu:
        qemu.ask("stop")
        expected = read_expected_series(qemu.ask)
        text = run_agent("once", "--format=prometheus", *flags, expect=(0, 1))
        assert read_expected_series(qemu.ask) == expected, "the guest stands still"
    found = keep_statistics(text, f"{UUID}-{qemu.pid}", text_string_to_metric_families)
    if source == "stats_fd":  # QEMU holds no stats fd of the VM itself
        expected = {series: value for series, value in expected.items() if series[0].startswith("kvm_vcpu_")}
    assert found == pytest.approx(expected, rel=1e-12)
