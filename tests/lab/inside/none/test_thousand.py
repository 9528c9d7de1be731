"""A guest makes exactly 1,000 notify exits, and everybody who counts them says 1000."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from exporter.flag_values import SOURCES
from tests.lab.inside.agent import find_labels, find_per_vcpu, run_once
from tests.lab.inside.conftest import UUID
from tests.lab.inside.kvm_readers import read_vcpu_statistics, read_vm_statistic
from tests.lab.inside.perf_reader import open_perf_reader
from tests.live import GuestProcess, open_guest_process

THOUSAND = 1000
# Loading BPF takes up to twenty seconds under emulation; where it does not matter, the agent does without.
FAST = "--collector.source=stats_fd"


@dataclass(frozen=True)
class Made:
    """What the guest made, and the records that the kernel wrote meanwhile."""

    guest: GuestProcess
    rip: int
    records: list[dict[str, int]]


@pytest.fixture(scope="module")
def made(injector: None) -> Iterator[Made]:
    """A guest of which vCPU 0 has just made its notify exits, at one RIP with nothing in between."""
    with open_guest_process(vcpus=2, name="stuck", uuid=UUID, stats_fds=True) as guest:
        with open_perf_reader("kvm/kvm_exit", guest.vcpus[0].tid, "exit_reason == 75 && isa == 1") as reader:
            guest.notify(0, exits=THOUSAND)
            done = guest.wait_for("done")
            records = reader.read()
        yield Made(guest, done["code"], records)


def test_records(made: Made) -> None:
    seen = {(record["exit_reason"], record["isa"], record["guest_rip"], record["vcpu_id"]) for record in made.records}
    assert seen == {(75, 1, made.rip, 0)}
    assert len(made.records) == THOUSAND


def test_stats_fd_and_debugfs(made: Made) -> None:
    counts = [read_vcpu_statistics(made.guest, vcpu)["notify_window_exits"] for vcpu in made.guest.vcpus]
    assert counts == [THOUSAND, 0]
    assert read_vm_statistic(made.guest, "notify_window_exits") == THOUSAND


@pytest.mark.parametrize("source", SOURCES)
def test_the_agent_by_each_source(made: Made, source: str) -> None:
    text = run_once("--format=prometheus", f"--collector.source={source}")
    vm = f"{UUID}-{made.guest.pid}"
    assert [value for _, value in find_labels(text, "kvm_vm_notify_window_exits_total", vm)] == [THOUSAND]
    # debugfs has the VM's sum only: the vCPUs' counts are then not known, and not 0.
    per_vcpu = {} if source == "debugfs" else {"0": THOUSAND, "1": 0}
    assert find_per_vcpu(text, "kvm_vcpu_notify_window_exits_total", vm) == per_vcpu


def test_the_agent_as_json(made: Made) -> None:
    (vm,) = (vm for vm in json.loads(run_once("--format=json", FAST))["vms"] if vm["uuid"] == UUID)
    seen = {(vcpu["vcpu"], vcpu["vcpu_id"], vcpu["tid"], vcpu["notify_window_exits"]) for vcpu in vm["vcpus"]}
    expected = zip(made.guest.vcpus, (THOUSAND, 0), strict=True)
    assert seen == {(vcpu.index, vcpu.vcpu_id, vcpu.tid, count) for vcpu, count in expected}


def test_the_agent_as_a_table(made: Made) -> None:
    rows = [row.split() for row in run_once("--format=table", FAST).splitlines()]
    tids = [str(vcpu.tid) for vcpu in made.guest.vcpus]
    counts = {row[-5]: int(row[-4]) for row in rows if row and row[0] == f"{UUID}-{made.guest.pid}"}
    assert counts == {tids[0]: THOUSAND, tids[1]: 0}
