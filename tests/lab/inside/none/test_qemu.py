"""A real QEMU with -accel kvm inside the lab: what it holds, and that the agent reads it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.lab.inside.agent import find_labels, find_per_vcpu, run_once
from tests.qmp_statistics import keep_statistics, read_expected_series
from tests.waiting import wait_until

UUID = "7b1f0a52-6a83-4f8e-9a0e-2f3b6f0a9c11"
VCPUS = 2
QMP_SECONDS = 120


class Qemu:
    """A running QEMU and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket, lines: IO[bytes]) -> None:
        self.pid = process.pid
        self._monitor = monitor
        self._lines = lines
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Returns the monitor's answer to a command, passing over events."""
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer: dict[str, Any] = json.loads(self._lines.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    """A QEMU whose guest, the firmware, has run and is stopped: its counters stand still."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        ours.settimeout(QMP_SECONDS)
        monitor = ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        words = ["qemu-system-x86_64", "-accel", "kvm", "-smp", str(VCPUS), "-m", "64", "-nodefaults"]
        words += ["-display", "none", "-name", "guest=real,debug-threads=on", "-uuid", UUID, *monitor]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        stack.callback(process.wait)
        stack.callback(process.kill)
        theirs.close()
        qemu = Qemu(process, ours, stack.enter_context(ours.makefile("rb")))
        wait_until(lambda: read_qmp_statistic(qemu, "exits")["0"], "an exit of the firmware", QMP_SECONDS)
        qemu.ask("stop")
        yield qemu


def read_qmp_statistic(qemu: Qemu, name: str) -> dict[str, int]:
    """Returns a statistic by vCPU index, as QEMU itself reads it from KVM."""
    indexes = {cpu["qom-path"]: str(cpu["cpu-index"]) for cpu in qemu.ask("query-cpus-fast")["return"]}
    wanted = [{"provider": "kvm", "names": [name]}]
    answers = qemu.ask("query-stats", target="vcpu", providers=wanted)["return"]
    return {indexes[answer["qom-path"]]: answer["stats"][0]["value"] for answer in answers}


def test_it_holds_a_stats_fd_for_each_vcpu(qemu: Qemu) -> None:
    links = [os.readlink(fd) for fd in Path(f"/proc/{qemu.pid}/fd").iterdir()]
    held = sorted(link for link in links if link.startswith("anon_inode:kvm-vcpu-stats:"))
    assert held == [f"anon_inode:kvm-vcpu-stats:{vcpu}" for vcpu in range(VCPUS)]


def test_its_vcpu_threads_have_names(qemu: Qemu) -> None:
    names = {
        cpu["cpu-index"]: Path(f"/proc/{qemu.pid}/task/{cpu['thread-id']}/comm").read_text(encoding="ascii").strip()
        for cpu in qemu.ask("query-cpus-fast")["return"]
    }
    assert names == {vcpu: f"CPU {vcpu}/KVM" for vcpu in range(VCPUS)}


def test_the_agent_reads_what_qemu_reads(qemu: Qemu) -> None:
    text = run_once("--format=prometheus", "--collector.source=stats_fd")
    exits = read_qmp_statistic(qemu, "exits")
    assert find_per_vcpu(text, "kvm_vcpu_exits_total", f"{UUID}-{qemu.pid}") == exits
    assert max(exits.values()) > 0
    notify = read_qmp_statistic(qemu, "notify_window_exits")
    assert find_per_vcpu(text, "kvm_vcpu_notify_window_exits_total", f"{UUID}-{qemu.pid}") == notify


@pytest.mark.parametrize("source", ["bpf", "stats_fd"])
def test_the_agent_has_every_statistic_that_qemu_reads(qemu: Qemu, source: str) -> None:
    expected = read_expected_series(lambda command, **arguments: qemu.ask(command, **arguments)["return"])
    flags = ("--collector.stats", "--collector.stats.level=vcpu", f"--collector.source={source}")
    found = keep_statistics(
        run_once("--format=prometheus", *flags), f"{UUID}-{qemu.pid}", text_string_to_metric_families
    )
    if source == "stats_fd":  # QEMU holds no stats fd of the VM itself
        expected = {series: value for series, value in expected.items() if series[0].startswith("kvm_vcpu_")}
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_agent_knows_who_it_is(qemu: Qemu) -> None:
    text = run_once("--format=prometheus", "--collector.source=stats_fd")
    ((labels, _),) = find_labels(text, "kvm_vm_info", f"{UUID}-{qemu.pid}")
    expected = {"name": "real", "uuid": UUID, "vmm": "qemu", "pid": str(qemu.pid)}
    assert {name: labels[name] for name in expected} == expected
    ((_, vcpus),) = find_labels(text, "kvm_vm_vcpus", f"{UUID}-{qemu.pid}")
    assert vcpus == VCPUS
